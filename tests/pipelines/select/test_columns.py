"""`Scorer.columns`: what a method aggregates, for the whole pool or for a shortlist."""

from contextlib import contextmanager

import pytest
import torch

from pipelines.runs.folder import Run
from pipelines.select import run as select
from pipelines.select.scorer import scorer
from pipelines.settings.methods import SCORERS

WITH_COLUMNS = [name for name in SCORERS if scorer(name).columns is not None]
SHORTLIST = [41, 3, 17, 3, 59, 0]  # out of order, and a row twice


@contextmanager
def context_of(config):
    select.check(config)
    with Run(config.out, config, "select") as run:
        yield select._context(config, run)


def test_methods_that_compare_with_a_target_have_columns():
    assert {"less", "tfidf", "bm25", "rds"} <= set(WITH_COLUMNS)


@pytest.mark.parametrize("method", WITH_COLUMNS)
def test_a_shortlist_has_the_columns_that_it_has_in_the_whole_pool(world, tmp_path, method):
    """And only its rows are computed; then the whole pool, from a folder in which some rows are done."""
    twin = tmp_path / "twin.jsonl"
    lines = world.pool.read_text().splitlines()
    twin.write_text("\n".join([*lines, lines[5].replace("a-5", "copy")]) + "\n")  # row 60 repeats row 5
    settings = world.select(tmp_path / "run", method=method)
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"paths": [str(twin)], "dedup": "exact"})}
    )
    functions = scorer(method)
    with context_of(settings) as context:
        some = functions.columns(context, [*SHORTLIST, 60])
        whole = functions.columns(context, None)
        names, groups = functions.groups(context)
    assert some.dtype == whole.dtype == torch.float32
    assert whole.shape == (61, len(groups)) and some.shape == (7, len(groups))
    assert set(groups.tolist()) == set(range(len(names)))
    assert some[6].isnan().all() and whole[60].isnan().all()  # a duplicate
    assert whole[:60].isfinite().all() and some[:6].isfinite().all()
    torch.testing.assert_close(some[:6], whole[SHORTLIST], rtol=0, atol=2e-3)
    assert functions.columns.__module__ == SCORERS[method]


@pytest.mark.parametrize("method", WITH_COLUMNS)
def test_another_shortlist_after_an_interrupted_one_is_computed(world, tmp_path, method, monkeypatch):
    """Units that were planned for the first shortlist do not block the second."""
    from datatools import GradientFeatures

    config = world.select(tmp_path / "run", method=method)
    inner, left = GradientFeatures.write_unit, [1]

    def write_unit(self, *args, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return inner(self, *args, **options)

    monkeypatch.setattr(GradientFeatures, "write_unit", write_unit)
    try:
        with context_of(config) as context:
            scorer(method).columns(context, list(range(40)))
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(GradientFeatures, "write_unit", inner)
    with context_of(config) as context:
        assert scorer(method).columns(context, [50, 51]).isfinite().all()
