"""A scorer and a selector are added with one file and one line each: everything else learns of them by itself."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from datatools import AGGREGATIONS, SELECTORS, UsageError
from datatools.selection.selectors import Selector
from pipelines.cli.app import main
from pipelines.select import run as select
from pipelines.settings.methods import SCORERS, known
from tests.pipelines.conftest import World

LETTERS = '''
"""Letters: rows that have letters in common with the target."""

import numpy as np
import torch

from pipelines.select.scored import from_similarity
from pipelines.settings.methods import Method

METHOD = Method(
    summary="letters in common with the target rows",
    title="Letters in common",
    meaning="The score is the share of letters that the row has in common with the target rows.",
    label="common letters",
    rows="rows picked by letters",
    needs=("target",),
    kind="similarity",
    cost="nothing",
    limits="knows no words",
)


def alphabets(rows):
    return [set(rows.pool[i].whole.lower()) for i in np.flatnonzero(rows.usable).tolist()]


def shared(ours, theirs):
    return torch.tensor([[len(a & b) / len(a | b) for b in theirs] for a in ours])


def score(context):
    similarity = shared(alphabets(context.pool), alphabets(context.wanted))
    return from_similarity(context, similarity, formula={"name": "letters", "text": "letters in common"})


def nearest(asked):
    place = np.flatnonzero(asked.pool.usable).tolist().index(asked.index)
    return shared(alphabets(asked.pool), alphabets(asked.target))[place]
'''
"""One file; with its line in SCORERS, all that there is to write."""

EVERY_OTHER = '''
"""Every other row of the ranking."""

import torch

from datatools import Selection
from datatools.selection.fill import fill


def every_other(candidates, budget, *, seed=0, max_per_source=None, reference=None):
    """The best row, the third best, the fifth best, and so on."""
    order = candidates.order(candidates.scores.numpy())[::2]
    chosen = fill(order, candidates, budget, max_per_source)
    return Selection(torch.tensor(chosen), why=["an odd rank"] * len(chosen))
'''


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letters_plugin.py").write_text(LETTERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SCORERS, "letters", "letters_plugin")
    monkeypatch.delitem(sys.modules, "letters_plugin", raising=False)


@pytest.fixture
def every_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "every_other_plugin.py").write_text(EVERY_OTHER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "every_other_plugin", raising=False)
    from every_other_plugin import every_other as function

    monkeypatch.setitem(SELECTORS, "every_other", Selector(function, scores=True))


def told(capsys: pytest.CaptureFixture[str], *argv: str | Path, code: int = 0) -> str:
    """What a command says on both streams, on one line."""
    capsys.readouterr()
    assert main([str(part) for part in argv]) == code
    return " ".join("".join(capsys.readouterr()).split())


def chosen(run: Path) -> bytes:
    return (run / "selected.jsonl").read_bytes()


@pytest.mark.usefixtures("letters")
def test_a_scorer_is_one_file_and_one_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert known("letters").title == "Letters in common" and "letters_plugin" not in sys.modules
    run = tmp_path / "run"
    argv = world.argv("select", "--method", "letters", out=run)
    assert "Letters in common" in told(capsys, *argv)  # the end in the terminal
    before = chosen(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "letters" and "parameters" not in summary["model"]
    page = (run / "report.html").read_text()
    assert "Letters in common" in page and "share of letters that the row has in common" in page

    assert "letters in common with the" in told(capsys, "ls", "methods")
    assert "did you mean 'letters'?" in told(capsys, *argv, "--method", "leters", code=2)
    assert "got none; name them with --target" in told(
        capsys, "select", "--model", world.model, "--train", world.pool, "--method", "letters", code=2
    )
    told(capsys, *argv)  # resumed: the same selection
    assert chosen(run) == before
    told(capsys, "select", run / "run.yaml", "--out", tmp_path / "again")  # replayed
    assert chosen(tmp_path / "again") == before

    names = [row["_nearest"] for row in pq.read_table(run / "scores.parquet").to_pylist() if row["_selected"]]
    said = told(capsys, "explain", f"{run / 'selected.jsonl'}:1")
    assert "target rows that it is most like" in said and "chosen by --method letters" in said
    assert any(name in said for name in names)

    assert "--against letters: it compares with target rows" in told(
        capsys, "audit", "--selected", run / "selected.jsonl", "--test", world.test, "--against", "letters",
        "--set", "target=[]", code=2,
    )  # fmt: skip
    said = told(
        capsys, "audit", "--selected", run / "selected.jsonl", "--test", world.test, "--against", "letters",
        "--seeds", "1", "--epochs", "1",
    )  # fmt: skip
    assert "letters (one seed: no interval)" in said
    page = (run / "report.html").read_text()
    assert "common letters" in page


@pytest.mark.usefixtures("every_other")
def test_a_selector_is_one_file_and_one_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    argv = world.argv("select", "--method", "tfidf", "--selector", "every_other", out=run)
    told(capsys, *argv)
    before = chosen(run)
    table = pq.read_table(run / "scores.parquet").to_pylist()
    assert sorted(row["_rank"] for row in table if row["_selected"]) == [1, 3, 5, 7, 9, 11]
    assert "selector=every_other" in (run / "report.html").read_text()
    assert "selector: every_other" in (run / "run.yaml").read_text()

    assert "The best row, the third best, the fifth best" in told(capsys, "ls", "selectors")
    assert "did you mean 'every_other'?" in told(capsys, *argv, "--selector", "every_ther", code=2)
    told(capsys, *argv)  # resumed: the same selection
    assert chosen(run) == before
    assert "selector was every_other, is random" in told(capsys, *argv, "--selector", "random", code=2)
    told(capsys, "select", run / "run.yaml", "--out", tmp_path / "again")  # replayed
    assert chosen(tmp_path / "again") == before
    said = told(capsys, "explain", run, next(r["_id"] for r in table if r["_rank"] == 2))
    assert "not chosen" in said and "--selector every_other" in said


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_every_selector_is_reached_from_the_command_line(world: World, tmp_path: Path, name: str) -> None:
    run = select.run(world.select(tmp_path / "run", method="tfidf", selector=name))
    assert chosen(run).count(b"\n") == 6
    reasons = set(pq.read_table(run / "selected.parquet", columns=["_why"])["_why"].to_pylist())
    assert all(("most similar" in reason) == SELECTORS[name].scores for reason in reasons)


@pytest.mark.parametrize("name", sorted(set(SELECTORS) & set(AGGREGATIONS)))
@pytest.mark.parametrize("method", ["tfidf", "rds"])
def test_turns_between_target_rows_take_the_same_rows_both_ways(
    world: World, tmp_path: Path, name: str, method: str
) -> None:
    """`--selector round_robin` is `--set aggregate=round_robin`, but for the scores, which stay similarities."""
    turns = select.run(world.select(tmp_path / "a", method=method, selector=name))
    places = select.run(world.select(tmp_path / "b", method=method, aggregate=name))
    assert chosen(turns) == chosen(places)
    score, nearest = (pq.read_table(turns / "scores.parquet")[c].to_pylist() for c in ("_score", "_nearest_similarity"))
    assert max(score) <= max(nearest) < 1.001


def test_a_selector_that_cannot_work_is_refused_before_anything_is_read(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--selector top_k needs scores, and --method random gives none"):
        select.run(world.select(tmp_path / "a", method="random", selector="top_k"))
    with pytest.raises(
        UsageError, match="--selector bids chooses by the similarity to each target row, and --method loss compares"
    ):
        select.run(world.select(tmp_path / "a", method="loss", selector="bids"))
    with pytest.raises(UsageError, match="--selector random_length compares with target rows"):
        select.run(world.select(tmp_path / "b", method="loss", selector="random_length", target=[]))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_the_record_that_is_read_is_the_one_that_is_imported() -> None:
    from importlib import import_module

    from pipelines.settings.methods import _read

    for name, module in SCORERS.items():
        assert _read(module) == import_module(module).METHOD, name
