"""Add an order estimator: one file, and one line in `ESTIMATORS`. Everything else reads the class."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from datatools.order.estimators import ESTIMATORS
from pipelines import listing
from pipelines.cli.app import main
from tests.tiny import save_tiny_model, write_rows

FILE = '''
"""First-order: the later a batch comes, the more of its gradient is left in the end."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from datatools.order import Cost, Surrogate


@dataclass(frozen=True, eq=False)
class Recency(Surrogate):
    name: ClassVar[str] = "recency"
    title: ClassVar[str] = "gradients along the held-out gradient, the later the more"
    once: ClassVar[str] = "a gradient per batch"
    each: ClassVar[str] = "T numbers"
    source: ClassVar[str] = "this test"
    limits: ClassVar[dict[str, float]] = {"recency": 0.5}

    slopes: Tensor

    @classmethod
    def precompute(cls, reference, problem, **options):
        end = reference.end.params
        held = problem.held_out_gradient(end)
        slopes = [
            sum(float((g * held[name]).sum()) for name, g in problem.gradient(end, batch).items())
            for batch in range(len(problem.batches))
        ]
        cost = Cost(gradients=len(slopes) + len(problem.validation))
        return cls(reference.sequence, cost, torch.tensor(slopes, dtype=torch.float64))

    @classmethod
    def expected(cls, question):
        return Cost(gradients=question.batches + question.held_out)

    @classmethod
    def fast(cls, settings):
        return True

    def _scores(self, sequences):
        late = torch.linspace(0, 1, sequences.shape[1], dtype=torch.float64)
        return -(self.slopes[sequences] * late).sum(1)

    def trust(self, sequence):
        return {"recency": 0.9}
'''


def test_an_estimator_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recency_plugin.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(ESTIMATORS, "recency", "recency_plugin:Recency")  # the one line

    save_tiny_model(tmp_path / "model", layers=1, hidden=16)
    write_rows(tmp_path / "data.jsonl", 40)
    out = tmp_path / "run"
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--batches", "3",
             "--batch-size", "4", "--warmup-steps", "0", "--set", "held_out=4", "--set", "seeds=0"]  # fmt: skip
    validate = ["order", "validate", *given, "--orders", "4", "--estimators", "recency,pairwise", "--out", str(out)]
    assert main(validate) == 0
    said = capsys.readouterr().err
    assert "recency: 4 gradients, 0 Hessian-vector products" in said, "the cost before it runs"
    assert "recency: Spearman" in said and "not to be trusted for 4 of 4" in said, "its own limit"
    found = json.loads((out / "validation.json").read_text())["estimators"]
    assert list(found) == ["recency", "pairwise"] and found["recency"]["gradients"] == 4
    assert "recency" in (out / "report.html").read_text()

    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*recency*/*")} | {
        p: p.stat().st_mtime_ns for p in (out / "estimates").iterdir()
    }
    assert len(kept) == 4, "a surrogate of two files, and an estimate of each"
    for path in (out / "estimates").glob("recency-*"):
        path.unlink()  # as if it had been killed between the two
    assert main([*validate, "--quiet"]) == 0
    assert (
        json.loads((out / "validation.json").read_text())["estimators"]["recency"]["estimated"]
        == (found["recency"]["estimated"])
    )
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items() if p.parent.name != "estimates")
    assert main(["order", "search", "--out", str(out), "--estimators", "recency", "--quiet", "--set", "retrain=0"]) == 0
    assert json.loads((out / "search.json").read_text())["estimator"] == "recency"
    assert main(["report", str(out)]) == 0

    assert "recency" in listing.names.known("estimator")
    screen = io.StringIO()
    listing.show("estimators", Console(file=screen, width=200))
    assert "recency" in screen.getvalue() and "this test" in screen.getvalue()
    capsys.readouterr()
    assert main(["order", "validate", *given, "--estimators", "recensy", "--out", str(tmp_path / "other")]) == 2
    assert "did you mean 'recency'" in capsys.readouterr().err
