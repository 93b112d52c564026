"""The statistics of the benchmark of fidelity, on numbers whose answers are known."""

import numpy as np
import pytest

from tests.benchmarks.fidelity_page import picture, table
from tests.benchmarks.fidelity_scores import correlations, datamodelling, front, interval


def test_losses_that_fall_by_the_influences_have_score_one():
    draw = np.random.default_rng(0)
    influences, inside = draw.normal(size=(12, 3)), draw.random((40, 12)) < 0.5
    losses = 2.0 - inside @ influences
    assert datamodelling(influences, inside, losses) == pytest.approx([1, 1, 1])
    assert datamodelling(-influences, inside, losses) == pytest.approx([-1, -1, -1])
    assert interval(influences, inside, losses, draws=20) == pytest.approx([1, 1])
    assert abs(datamodelling(draw.normal(size=(12, 3)), inside, draw.normal(size=(40, 3))).mean()) < 0.4
    assert correlations(np.ones((5, 1)), np.arange(5.0)[:, None]) == pytest.approx([0])


def test_the_front_has_what_nothing_beats():
    assert front([(1, 0.2), (2, 0.5), (2, 0.4), (3, 0.5), (4, 0.6), (1, 0.2)]) == [0, 1, 4, 5]


def test_the_picture_names_the_front_and_the_table_sorts_by_score():
    rows = [
        {"name": name, "score": score, "interval": [0.1, 0.2], "agreement": 0.9, "top": 1.0, "passes": cost,
         "bytes": 100 * cost, "best_by_passes": best, "best_by_bytes": best}
        for name, score, cost, best in (("a <b>", 0.3, 2.0, True), ("c", 0.1, 3.0, False), ("d", 0.4, 9.0, True))
    ]  # fmt: skip
    drawn = picture(rows)
    assert drawn.count("<circle") == 6 and "1 a &lt;b&gt;" in drawn and "2 d" in drawn and "2 c" not in drawn
    lines = table(rows).splitlines()
    assert [line.split(" |")[0] for line in lines[2:]] == ["| **d**", "| **a <b>**", "| c"]
