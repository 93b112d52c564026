"""The memory of a step of MeZO is that of inference; others, and back-propagation, for comparison."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import Report, Settings, interleaved
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.bench

MIB = 2**20
ARMS = ("inference", "mezo", "zo_momentum", "zo_adam", "forward", "backprop_adamw")


def test_peak_memory_of_a_step(bench: Settings, tmp_path: Path) -> None:
    rows = bench.size(8, 4)
    samples = interleaved({arm: lambda arm=arm: once(arm, rows) for arm in ARMS}, bench.times(2), bench.seconds)
    found = {arm: [sample.value for sample in samples[arm]] for arm in ARMS}
    first = found["inference"][0]
    report = Report("zeroth_order", "Peak resident memory of training a whole model, by method", bench)
    report.workload = {key: first[key] for key in ("rows", "tokens")} | {
        "weights, MiB": first["weights"] / MIB,
        "largest tensor, MiB": first["largest"] / MIB,
    }
    inference = middle(found["inference"], "peak")
    for arm in ARMS:
        report.add(f"{arm}: peak", middle(found[arm], "peak") / MIB, "MiB")
    for arm in ARMS[1:]:
        aim = {"at_most": 1.1} if arm == "mezo" else {}
        report.add(f"{arm}: peak over that of inference", middle(found[arm], "peak") / inference, "times", **aim)
    report.add(
        "mezo: peak above inference, over the largest tensor",
        (middle(found["mezo"], "peak") - inference) / first["largest"],
        "times",
        at_most=1.0,
    )
    for arm in ARMS:
        report.add(f"{arm}: a step (inference: two forward passes)", middle(found[arm], "seconds"), "s")
    report.notes.append(
        "Each arm runs in a process of its own, three steps on one batch of rows of 128 tokens with answers of 32; "
        "resident memory is the kernel's count, of the whole process, and the peak its high-water mark"
        + (", reset once the model is loaded." if first["reset"] else " over the whole process.")
    )
    report.keep(samples)
    report.write(tmp_path)


def middle(found: list[dict[str, Any]], field: str) -> float:
    return statistics.median(f[field] for f in found)


def once(arm: str, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.zeroth_order_once", arm, str(rows)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
