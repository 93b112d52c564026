"""Several processes share one run."""

from pathlib import Path

import pytest

from datatools import EnvironmentProblem
from pipelines.runs import messages, workers
from pipelines.runs.folder import Run
from pipelines.runs.progress import progress
from tests.pipelines.runs.common import config


def test_only_rank_0_writes_and_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Run("r", config(), "select") as run, run.stage("x"), progress("y", 3) as bar:
        bar.advance(3)
        messages.warn("w")
        assert run.check({"data": 1}) == []
    assert not Path("r").exists() and capsys.readouterr().err == "" and workers.world_size() == 2
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(EnvironmentProblem, match="RANK is 'one'"):
        workers.rank()
