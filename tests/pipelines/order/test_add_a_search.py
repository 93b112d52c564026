"""Add a search among orders: one file, and one line in `SEARCHES`. Everything else reads the table."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from datatools.order import SEARCHES
from pipelines import listing
from pipelines.cli.app import main
from tests.tiny import save_tiny_model, write_rows

FILE = '''
"""Rotations of the reference order."""

import numpy as np


def rotations(scorer, starts, rng):
    """All rotations of every start. A second sentence, which the list leaves out."""
    for start in starts:
        if scorer.left > 0:
            scorer(np.stack([np.roll(start, shift) for shift in range(len(start))]))
'''


def test_a_search_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rotations_plugin.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin = importlib.import_module("rotations_plugin")
    monkeypatch.setitem(SEARCHES, "rotations", plugin.rotations)  # the one line

    save_tiny_model(tmp_path / "model", layers=1, hidden=16)
    write_rows(tmp_path / "data.jsonl", 40)
    out = tmp_path / "run"
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--batches", "4",
             "--batch-size", "4", "--warmup-steps", "0", "--set", "held_out=4", "--estimators", "pairwise",
             "--set", "retrain=0"]  # fmt: skip
    assert main(["order", "search", *given, "--search", "rotations", "--out", str(out)]) == 0
    assert "rotations: predicted" in capsys.readouterr().err
    found = json.loads((out / "search.json").read_text())
    assert found["method"] == "rotations" and found["evaluations"] % 4 == 0
    proposed = next(row["sequence"] for row in found["rows"] if row["name"] == found["proposed"])
    assert sorted(proposed) == list(range(4)) and (out / "order.npz").is_file()
    if found["proposed"].startswith("found"):
        assert any(np.array_equal(proposed, np.roll(range(4), shift)) for shift in range(4))
    assert main(["report", str(out)]) == 0

    assert ("rotations", "All rotations of every start.") in listing.rows("searches")
    capsys.readouterr()
    assert main(["order", "search", *given, "--search", "rotation", "--out", str(tmp_path / "other")]) == 2
    assert "did you mean 'rotations'" in capsys.readouterr().err
