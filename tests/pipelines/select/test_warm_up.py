"""The rows of the warm-up, when the pool is no longer the one that they were drawn from."""

import pytest

from datatools import DataError
from pipelines.select import run as select
from tests.tiny import write_rows


def test_an_accepted_pool_without_the_warm_up_rows_makes_the_warm_up_again(own_world, tmp_path, capsys):
    """Everything then is of the new pool, as in a fresh run, and what was made of the old one is kept aside."""
    folder = select.run(own_world.select(tmp_path / "run"))
    old = (folder / "selected.jsonl").read_bytes()
    write_rows(own_world.pool, 60, start=2000)
    with pytest.raises(DataError, match="changed since the run"):
        select.run(own_world.select(tmp_path / "run"))
    select.run(own_world.select(tmp_path / "run", accept_change=["data"]))
    assert "warm-up rows, changed: the earlier results are in" in capsys.readouterr().err
    fresh = select.run(own_world.select(tmp_path / "fresh"))
    for name in ("selected.jsonl", "warmup/rows.json"):
        assert (folder / name).read_bytes() == (fresh / name).read_bytes()
    assert (folder / "before-change-1" / "selected.jsonl").read_bytes() == old
