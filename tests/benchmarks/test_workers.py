"""Two workers against one, with one thread each: extraction of gradients with a tiny model, end to end in a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio
from tests.conftest import REPOSITORY
from tests.pipelines.conftest import make_world
from tests.pipelines.select.looking import outcome
from tests.tiny import write_rows

pytestmark = pytest.mark.bench


def seconds_of_features(run: Path) -> float:
    """The seconds of the stages in which features are computed."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return sum(
        float(event["seconds"])
        for event in events
        if event["event"] == "stage_end" and event["name"].startswith("features")
    )


def test_workers(bench: Settings, tmp_path: Path) -> None:
    """The helper's start (Python, torch, the model) overlaps with the leader's reading and warm-up; the rest counts."""
    report = Report("workers", "Workers that share the units of one run", bench)
    world = make_world(tmp_path / "world")
    rows = bench.size(10_000, 200)
    write_rows(world.pool, rows)
    number = 0

    def select(workers: int) -> dict[str, Any]:
        nonlocal number
        number += 1
        out = tmp_path / f"run-{number}"
        more = ["--epochs", 1, "--set", "features.rows_per_unit=100", "--workers", workers]
        subprocess.run(
            [sys.executable, "-m", "pipelines", *world.argv("select", *map(str, more), out=out), "--quiet"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return {"features": seconds_of_features(out), "out": str(out)}

    samples = interleaved({"1": lambda: select(1), "2": lambda: select(2)}, bench.times(3), bench.seconds)
    one, two = samples["1"], samples["2"]
    report.workload = {"rows": rows, "cores": len(os.sched_getaffinity(0)), "threads": 1, "rows_per_unit": 100}
    apart = [sum(sample.value["features"] for sample in arm) / len(arm) for arm in (one, two)]
    report.add("features, one worker", apart[0], "s")
    report.add("features: one worker / two workers", apart[0] / apart[1], "x", at_least=1.8 if rows > 1000 else None)
    report.add("whole command, one worker", median(one), "s")
    report.add("whole command: two workers / one", ratio(two, one), "x")
    assert outcome(Path(one[0].value["out"])) == outcome(Path(two[0].value["out"]))
    report.notes.append("The bytes of stores, scores and selection are compared; both runs use one thread per worker.")
    report.keep(samples)
    report.write(tmp_path)
