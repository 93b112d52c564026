"""Somebody adds a coreset method: one record, and training, report, `ls` and errors know it."""

import json

import pytest
import torch

from datatools import CORESET_METHODS, CoresetMethod, Selection
from pipelines import listing
from pipelines.cli.app import main
from pipelines.report import pages
from pipelines.report.colm_page import method_in_words


def longest_lever(features, k, **_):
    """The whole of a method that somebody adds: rows with the largest first number."""
    return Selection(features[:, 0].abs().argsort(descending=True)[:k].cpu(), weights=torch.full((k,), 1.5))


@pytest.fixture
def added(monkeypatch):
    record = CoresetMethod(
        name="longest_lever", title="rows with the longest lever", choose=longest_lever, cost="O(n)", weighted=True
    )
    monkeypatch.setitem(CORESET_METHODS, record.name, record)


def arguments(world, out, *more):
    argv = ["train", "--model", world.model, "--data", world.pool, "--coreset", "colm", "--keep", 4]
    return [str(a) for a in (*argv, "--lora-rank", 2, "--set", "training.max_steps=3", *more, "--out", out)]


def test_a_coreset_method_that_somebody_adds_trains_and_is_reported(added, world, tmp_path, monkeypatch, capsys):
    own = ["--set", "coreset.method=longest_lever", "--set", "coreset.monitor_every=1"]
    assert main(arguments(world, tmp_path / "run", *own)) == 0
    assert "4 rows kept of 8 per step, by longest_lever" in capsys.readouterr().err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3 and all(step["match_error"] > 0 for step in steps)
    assert "rows with the longest lever" in (tmp_path / "run" / "report.html").read_text()
    assert ("longest_lever", "rows with the longest lever", "O(n)") in listing.rows("coresets")
    monkeypatch.delitem(CORESET_METHODS, "longest_lever")  # drawn again where nobody has added it
    assert "rows chosen by &#39;longest_lever&#39;" in pages.draw(tmp_path / "run").read_text()


def test_what_its_record_says_is_asked_of_it(added, world, tmp_path, capsys):
    assert main(arguments(world, tmp_path / "a", "--set", "coreset.method=longest_leaver")) == 2
    assert "or 'longest_lever'; did you mean 'longest_lever'?" in capsys.readouterr().err
    tokens = ["--set", "coreset.method=longest_lever", "--set", "coreset.loss_weighting=token"]
    assert main(arguments(world, tmp_path / "b", *tokens)) == 2
    assert "longest_lever gives weights to rows" in " ".join(capsys.readouterr().err.split())
    assert main(arguments(world, tmp_path / "c", "--set", "coreset.features=exakt")) == 2
    assert "setting 'coreset.features' is 'exakt'; should be 'exact'" in capsys.readouterr().err
    assert method_in_words("herding") == CORESET_METHODS["herding"].title
