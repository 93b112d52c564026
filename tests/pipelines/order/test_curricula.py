"""What the task `curricula` does with orders that diverge; `test_order.py` runs the task."""

import math

from pipelines.order.curricula import _loss


def test_a_diverged_order_is_the_last_one():
    rows = [{"true": math.nan, "name": "a"}, {"true": 2.0, "name": "b"}, {"true": 1.0, "name": "c"}, {"name": "d"}]
    assert min(rows, key=lambda row: _loss(row, "true"))["name"] == "c"
    assert [row["name"] for row in sorted(rows, key=lambda row: _loss(row, "true"))] == ["c", "b", "a", "d"]
