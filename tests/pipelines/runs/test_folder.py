"""Run folders: who may use one, what it records, what stops a run from being continued, and how an interrupt ends."""

import json
import time
from pathlib import Path

import pytest

from datatools import UsageError
from pipelines.runs import current, messages
from pipelines.runs.folder import Run
from pipelines.runs.progress import progress
from pipelines.settings.load import load_config
from pipelines.settings.select import SelectConfig
from tests.pipelines.runs.common import config, read


def test_a_run_explains_itself(tmp_path):
    with Run(tmp_path / "r", config(seed=7), "select") as run:
        run.check({"data": {"a.jsonl": "abc"}})
        with run.stage("read"), progress("reading", 10, "rows") as bar:
            bar.advance(10)
        messages.warn("odd row")
        assert current.run() is run and not run.resumed
    folder = tmp_path / "r"
    assert sorted(p.name for p in folder.iterdir()) == [
        "events.jsonl",
        "progress.json",
        "provenance.json",
        "run.yaml",
        "seals.jsonl",
    ]
    assert (folder / "run.yaml").read_text().startswith(f"# Replays this run: datatools select {folder}/run.yaml\n")
    assert load_config(SelectConfig, folder / "run.yaml", wanted=()) == config(seed=7)
    found = read(folder / "provenance.json")
    assert found["seed"] == 7 and found["facts"]["data"] == {"a.jsonl": "abc"} and found["changed"] == []
    assert set(found["facts"]["code"]) == {"version", "digest"} and found["versions"]["torch"]
    assert found["machine"]["cpus"] and found["world_size"] == 1
    assert read(folder / "progress.json")["state"] == "done"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "stage", "stage_end", "warning", "done"]
    assert run.warnings == ["odd row"] and run.stages[0]["name"] == "read"


def test_the_same_command_continues(tmp_path):
    with pytest.raises(ZeroDivisionError), Run("r", config(), "select") as run, run.stage("slow"):
        time.sleep(0.02)
        raise ZeroDivisionError
    assert read("r/progress.json")["state"] == "failed" and "ZeroDivision" in read("r/progress.json")["error"]
    before = Path("r/run.yaml").read_bytes()
    with Run("r", config(out=Path("elsewhere")), "select") as run:  # a moved folder is still the same run
        assert run.resumed
        with run.stage("slow"):
            pass
    assert Path("r/run.yaml").read_bytes() == before
    assert [s["name"] for s in run.stages] == ["slow"] and run.stages[0]["seconds"] >= 0.02


def test_paths_stay_inside():
    run = Run("r", config(), "select")
    assert run.path("a", "b.json") == Path("r/a/b.json")
    for parts in (("..", "x"), ("/etc",), ("a", "../../x"), ("a\0",)):
        with pytest.raises(UsageError, match="not a path inside"):
            run.path(*parts)
