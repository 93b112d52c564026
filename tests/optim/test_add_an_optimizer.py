"""An optimizer is one file and one line in a table: added to a copy of the packages, it trains and selects."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.tiny import save_tiny_model, write_rows

PLUGIN = '''
"""Signs: a step of the sign of the gradient."""

from dataclasses import dataclass
from typing import ClassVar

from optim.optimizer import Optimizer
from optim.moments import zero_step
from optim.rule import State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class SignsRule(UpdateRule):
    """The sign of the gradient.

    State:
        No bytes per parameter.

    Source:
        A test, 2026.
    """

    name: ClassVar[str] = "signs"

    def init(self, param) -> State:
        return {"step": zero_step()}

    def update(self, grad, state, param):
        return grad.sign(), {"step": state["step"] + 1}


class Signs(Optimizer):
    """Signs for all parameters."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, SignsRule(), lr=lr, weight_decay=weight_decay)
'''

TABLE_LINE = "from optim.rules.signs import Signs, SignsRule\n"

RUN = """
import sys
from pipelines.cli import main
model, rows = sys.argv[1:]
assert main(["ls", "optimizers"]) == 0
assert main(["train", "--model", model, "--data", rows, "--optimizer", "sign", "--out", "runs/x"]) == 2
common = ["--model", model, "--optimizer", "signs", "--epochs", "1", "--quiet"]
assert main(["train", "--data", rows, "--lora-rank", "0", "--out", "runs/t", *common]) == 0
pool = ["--train", rows, "--target", rows, "--budget", "4", "--dim", "64"]
assert main(["select", *pool, "--out", "runs/s", *common]) == 0
"""


@pytest.mark.slow
def test_one_file_and_one_line(tmp_path):
    """The command line, the suggestion for a misspelled name, training, and the features of a selection all find it."""
    code = tmp_path / "code"
    for package in ("optim", "datatools", "pipelines"):
        shutil.copytree(REPOSITORY / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "optim/rules/signs.py").write_text(PLUGIN)
    with (code / "optim/rules/__init__.py").open("a") as table:
        table.write(TABLE_LINE)
    model = save_tiny_model(tmp_path / "model", layers=1, hidden=16)
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, str(model), str(rows)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(code), "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "signs" in done.stdout and "A test" in done.stdout
    assert "did you mean 'signs'" in done.stderr
    assert (tmp_path / "runs/t/model/model.safetensors").exists()
    assert len((tmp_path / "runs/s/selected.jsonl").read_text().splitlines()) == 4
