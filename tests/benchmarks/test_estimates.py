"""What a dry run says that a run will take, against what the run then takes."""

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks.measure import Report, Settings
from tests.pipelines.conftest import commands, make_world
from tests.tiny import save_tiny_model, write_rows

pytestmark = pytest.mark.bench

TRAIN = "train --model $W/model --data $W/pool.jsonl --lora-rank 4 --epochs 1"
FULL = "train --model $W/model --data $W/pool.jsonl --lora-rank 0 --epochs 1"
SELECT = "select --model $W/model --train $W/pool.jsonl --target $W/target.jsonl --budget 10% --dim 256 --lora-rank 4"
RUNS = {
    "train, adapters": TRAIN,
    "train, few tokens per step": f"{TRAIN} --batch-size 2",
    "train, all weights": FULL,
    "train, all weights, Muon": f"{FULL} --optimizer muon",
    "train, validated": f"{TRAIN} --eval-data $W/test.jsonl --eval-every 2",
    "train, many checkpoints": f"{TRAIN} --set save_steps=1",
    "train, from forward passes": f"{TRAIN} --gradient zo",
    "train, a coreset": f"{TRAIN} --coreset colm --large-batch 16 --keep 8",
    "select, less": f"{SELECT} --method less",
    "select, rds": f"{SELECT} --method rds",
    "select, loss": f"{SELECT} --method loss",
    "select, auto": f"{SELECT} --method auto",
    "select, gist": f"{SELECT} --method gist",
    "select, tov": f"{SELECT} --method tov",
}
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_APART = ("read", "load model", "scan pool")
"""Stages that come before the estimate is made, so that it does not speak of them."""


def estimated(stderr: str) -> float:
    """The seconds that a dry run names."""
    words = re.search(r"about ((?:[\d.]+ (?:s|min|h|d) ?)+)", stderr)
    assert words is not None, stderr
    found = words.group(1).split()
    return sum(float(number) * _UNITS[unit] for number, unit in zip(found[::2], found[1::2], strict=True))


def taken(folder: Path) -> tuple[float, dict[str, float]]:
    """The seconds of the stages that an estimate speaks of, and of all stages by name."""
    stages: dict[str, float] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "stage_end":
            stages[event["name"]] = stages.get(event["name"], 0.0) + event["seconds"]
    return sum(seconds for name, seconds in stages.items() if name not in _APART), stages


def test_estimates(bench: Settings, tmp_path: Path) -> None:
    report = Report("estimates", "Dry runs against runs", bench)
    rows = bench.size(400, 120)
    world = make_world(tmp_path / "world").folder
    save_tiny_model(world / "model", layers=8, hidden=128)
    write_rows(world / "pool.jsonl", rows)
    with commands() as command:
        for name, text in RUNS.items():
            out = tmp_path / name.replace(" ", "-")
            argv = [*text.replace("$W", str(world)).split(), "--out", str(out)]
            dry = command(*argv, "--dry-run")
            assert dry.code == 0, dry.stderr
            done = command(*argv)
            assert done.code == 0, done.stderr
            said, (seconds, stages) = estimated(dry.stderr), taken(out)
            print(f"  {name}: {said:.3g} s said, {seconds:.3g} s taken; {stages}", flush=True)
            report.add(f"{name}: taken", seconds, "s")
            report.add(f"{name}: taken / said", seconds / max(0.05, said), "x", at_most=2.0)
    report.workload = {"rows": rows, "model": "8 layers of 128, random weights"}
    report.notes.append(
        "Each run is a fork of a process that has imported everything, with one thread; seconds are those of its "
        "stages after the rows are read and the model is loaded, of which an estimate does not speak. An estimate is "
        "good between 0.5 and 2."
    )
    report.write(tmp_path)
