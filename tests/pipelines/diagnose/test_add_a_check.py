"""Add a check to `datatools diagnose`: one file, and one line in `CHECKS`. Everything else reads the record."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipelines import listing
from pipelines.cli.app import main
from pipelines.diagnose.checks import CHECKS
from tests.tiny import save_tiny_model, write_rows

FILE = '''
"""Norms: how large the weights and their gradients are."""

from pipelines.diagnose.looks import Check, gradients


def norms(look, seed):
    grads = gradients(look.model, look.parts)
    return {
        "largest weight": max(float(p.detach().abs().max()) for p in look.model.parameters()),
        "gradient norm": sum(float(g.square().sum()) for g in grads.values()) ** 0.5,
        "tensors": len(grads),
    }


CHECK = Check(
    title="the largest weight and the norm of the gradient",
    cost="one pass",
    measure=norms,
    passes=lambda config: 1,
    source="this test",
)
'''


def test_a_check_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "norms_plugin.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(CHECKS, "norms", "norms_plugin:CHECK")  # the one line

    save_tiny_model(tmp_path / "model", layers=1, hidden=16)
    write_rows(tmp_path / "data.jsonl", 12)
    out = tmp_path / "run"
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--rows", "4"]
    command = ["diagnose", *given, "--checks", "norms,conditioning", "--out", str(out)]
    assert main(command) == 0
    assert "about 1 forward and backward pass" in " ".join(capsys.readouterr().err.split()), "its own cost"
    found = json.loads((out / "diagnose.json").read_text())["checks"]
    assert list(found) == ["conditioning", "norms"] and found["norms"]["tensors"] > 4
    page = (out / "report.html").read_text()
    assert "Norms" in page and "gradient norm" in page, "the report shows its numbers"

    kept = (out / "checks" / "norms.json").stat().st_mtime_ns
    assert main(command) == 0 and (out / "checks" / "norms.json").stat().st_mtime_ns == kept, "measured once"

    assert ("norms", "the largest weight and the norm of the gradient (this test)", "one pass") in listing.rows(
        "checks"
    )
    screen = io.StringIO()
    listing.show("checks", Console(file=screen, width=200))
    assert "norms" in screen.getvalue() and "this test" in screen.getvalue()
    capsys.readouterr()
    assert main(["diagnose", *given, "--checks", "norm", "--out", str(tmp_path / "other")]) == 2
    assert "did you mean 'norms'" in capsys.readouterr().err
