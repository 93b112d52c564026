"""`--method auto`: words choose a shortlist, gradients rank it."""

import json
from dataclasses import replace
from math import ceil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from datatools import GradientFeatures, coverage_order, fuse
from pipelines.cli.app import main
from pipelines.runs.folder import Run
from pipelines.select import run as select
from pipelines.select.auto import _at_stage, _length
from pipelines.select.scored import common_rows
from pipelines.select.scorer import scorer


def scores_of(folder):
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    return np.array(table["_score"]), np.array(table["_selected"])


@pytest.fixture
def small(monkeypatch):
    """A shortlist that is shorter than the pool of the tests."""
    monkeypatch.setattr("pipelines.select.auto.FEWEST", 8)
    monkeypatch.setattr("pipelines.select.scored.COMMON_ROWS", (6, 6))


def test_auto_by_hand(world, tmp_path, small):
    """The whole definition, from the columns of its parts."""
    config = world.select(tmp_path / "run", method="auto", budget="5")
    with Run(config.out, config, "select") as run:
        context = select._context(config, run)
        found = scorer("auto").score(context)
        tfidf, bm25 = (scorer(name).columns(context, None) for name in ("tfidf", "bm25"))
        own, theirs = (np.log1p(rows.scan.supervised[rows.usable]) for rows in (context.pool, context.wanted))
        lengths = torch.tensor([[-abs(a - b) for b in theirs.tolist()] for a in own.tolist()])
        first = fuse([tfidf, bm25, lengths], [1, 1, 2])
        n, m = first.shape
        taken: list[int] = []
        while len(taken) < _length(context):  # target rows take turns
            column = first[:, len(taken) % m].clone()
            column[taken] = -1
            taken.append(int(column.argmax()))
        at = sorted(taken)
        settings = _at_stage(config, "less")
        assert settings.features.checkpoints == "last" and settings.common is None
        cosines = scorer("less").columns(replace(context, config=settings), at).clamp(min=0)
        expected = first - 2
        expected[at] = cosines / cosines.mean() + tfidf[at] / tfidf[at].mean()
        torch.testing.assert_close(found.similarity, expected)
        assert (found.similarity >= 0).any(1).sum() == len(at) == max(15, ceil(0.2 * n)) < n
    select.run(config)
    order = coverage_order(expected).tolist()[:5]
    assert sorted(np.flatnonzero(scores_of(config.out)[1]).tolist()) == sorted(order)


def test_auto_computes_gradients_of_a_shortlist_only(world, tmp_path, small):
    config = world.select(tmp_path / "run", method="auto", budget="5")
    select.run(config)
    folder = next((config.out / "features").glob("train-*"))
    held = GradientFeatures.open(folder).rows()
    assert len(held.keys) == 15
    scores, chosen = scores_of(config.out)
    assert chosen.sum() == 5 and (scores[chosen] > 0).all()
    assert (scores >= 0).sum() == 15 and (scores[scores < 0] < -1).all()
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["method"] == "auto" or "auto" in json.dumps(summary)


def test_auto_takes_the_last_of_the_checkpoints_that_it_is_given(world, tmp_path, small):
    """As after its own warm-up; features.checkpoints asks for others."""
    warm = select.run(world.select(tmp_path / "warm", method="less", budget="5")) / "warmup"
    steps = sorted(int(path.name.partition("-")[2]) for path in warm.glob("checkpoint-*"))
    assert len(steps) > 1
    for wanted, there in ((None, steps[-1:]), ("all", steps)):
        out = tmp_path / f"run-{wanted}"
        config = world.select(out, method="auto", budget="5", checkpoints=[warm])
        select.run(config.model_copy(update={"features": config.features.model_copy(update={"checkpoints": wanted})}))
        assert sorted(int(path.name.partition("-")[2]) for path in (out / "features").glob("train-*")) == there


def test_auto_is_the_same_after_an_interruption(world, tmp_path, small, monkeypatch):
    config = world.select(tmp_path / "whole", method="auto", budget="5")
    select.run(config)
    broken = config.model_copy(update={"out": tmp_path / "broken"})
    inner, left = GradientFeatures.write_unit, [1]

    def write_unit(self, *args, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return inner(self, *args, **options)

    monkeypatch.setattr(GradientFeatures, "write_unit", write_unit)
    with pytest.raises(KeyboardInterrupt):
        select.run(broken)
    monkeypatch.setattr(GradientFeatures, "write_unit", inner)
    select.run(broken)
    name = "selected.jsonl"
    assert (broken.out / name).read_bytes() == (config.out / name).read_bytes()


def test_auto_without_words_compares_the_rest(world, tmp_path, small, capsys):
    for path in (tmp_path / "pool.jsonl", tmp_path / "dev.jsonl"):
        count = 30 if path.name == "pool.jsonl" else 3
        rows = [{"prompt": "?" * (i % 7 + 1), "completion": "!" * (i % 5 + 1), "id": f"{i}"} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = world.select(tmp_path / "run", method="auto", budget="3")
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"paths": [str(tmp_path / "pool.jsonl")], "columns": None}),
            "target": [str(tmp_path / "dev.jsonl")],
        }
    )
    select.run(config)
    assert "no row holds a word" in capsys.readouterr().err
    formula = json.loads((config.out / "summary.json").read_text())["formula"]["text"]
    assert formula.startswith("the cosine of the optimizer's update") and "TF-IDF" not in formula
    assert len((config.out / "selected.jsonl").read_text().splitlines()) == 3


def test_common_rows_are_a_sample_by_content(world, tmp_path):
    config = world.select(tmp_path / "run", method="tfidf")
    with Run(config.out, config, "select") as run:
        pool = select._context(config, run).pool
    rows = common_rows(pool, 0)
    assert rows == common_rows(pool, 0) != common_rows(pool, 1)
    assert len(rows) == len(set(rows)) == min(64, len(pool.unique()))


def test_common_directions_change_gradients(world, tmp_path):
    found = []
    for common in (None, 2):
        config = world.select(tmp_path / f"{common}", method="less")
        select.run(config.model_copy(update={"common": common}))
        found.append(scores_of(config.out)[0])
    assert not np.allclose(found[0], found[1])


def test_explain_knows_rows_on_and_off_the_shortlist(world, tmp_path, small, capsys):
    config = world.select(tmp_path / "run", method="auto", budget="5")
    select.run(config)
    capsys.readouterr()
    scores = scores_of(config.out)[0]
    for row in (int(scores.argmax()), int(scores.argmin())):
        assert main(["explain", str(config.out), f"{world.pool}:{row + 1}"]) == 0
        assert "target rows it helps most" in capsys.readouterr().out


def test_a_dry_run_of_auto_counts_the_shortlist(world, tmp_path, small, capsys):
    config = world.select(tmp_path / "run", method="auto", budget="5")
    select.run(config.model_copy(update={"dry_run": True}))
    assert "tokens through the model" in capsys.readouterr().err
    assert not config.out.exists()
