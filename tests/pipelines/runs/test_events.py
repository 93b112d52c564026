"""events.jsonl: what a kill or damage leaves of it, and the times of stages."""

import json
from pathlib import Path

from pipelines.runs.folder import Run
from tests.pipelines.runs.common import config


def test_a_cut_event_line_is_passed_over():
    with Run("r", config(), "select") as run, run.stage("one"):
        pass
    with open("r/events.jsonl", "ab") as file:
        file.write(b'{"time": "2026')
    with Run("r", config(), "select") as run:
        assert [s["name"] for s in run.stages] == ["one"]
    assert json.loads(Path("r/events.jsonl").read_text().splitlines()[-1])["event"] == "done"


def test_damaged_times_of_stages_are_passed_over_and_said(capsys):
    with Run("r", config(), "select") as run, run.stage("one"):
        pass
    path = Path("r/events.jsonl")
    text = path.read_text()
    at = text.index('"seconds": ') + len('"seconds": ')
    path.write_text(text[:at] + "9" + text[at + 1 :])
    with Run("r", config(), "select") as run:
        assert run.stages == []
    assert "1 damaged lines" in capsys.readouterr().err
