"""Time and memory per row of reading, selecting and scoring must not grow with the number of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import Report, Settings
from tests.benchmarks.rows_once import DIM, SCORED
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.bench

JOBS = ("index", "random", "tfidf", "scores")
MIB = 2**20


def test_rows(bench: Settings, tmp_path: Path) -> None:
    """10^4 and 10^5 rows; DATATOOLS_BENCH_ROWS=1000000 adds 10^6."""
    most = bench.size(100_000, 2_000)
    sizes = [most // 10, most] if most <= 100_000 else [10_000, 100_000, most]
    report = Report("rows", "Reading, selecting and scoring, by the number of rows", bench)
    of = f"{DIM} numbers of int8 per row, {SCORED} target rows"
    report.workload = {"rows": sizes, "jobs": list(JOBS), "scores": of}
    for job in JOBS:
        found = [once(tmp_path, job, rows) for rows in sizes]
        for rows, one in zip(sizes, found, strict=True):
            report.add(f"{job}, {rows:,} rows: processor time per row", 1e6 * one["cpu"] / rows, "us")
            report.add(f"{job}, {rows:,} rows: peak memory above what was resident", above(one) / MIB, "MiB")
        per_row = (above(found[-1]) - above(found[0])) / (sizes[-1] - sizes[0])
        report.add(f"{job}: memory per further row", per_row, "bytes")
        marginal = (found[-1]["cpu"] - found[0]["cpu"]) / (sizes[-1] - sizes[0])
        report.add(f"{job}: processor time per further row", 1e6 * marginal, "us")
    report.notes.append(
        "Each job runs in a process of its own, on generated chat rows of about 450 bytes, with the tokenizer of the "
        "model. Processor time includes the process that renders chat templates; that of the first rows includes the "
        "loading of libraries."
    )
    report.write(tmp_path)


def above(found: dict[str, Any]) -> float:
    return max(0.0, float(found["peak"] - found["before"]))


def once(folder: Path, job: str, rows: int) -> dict[str, Any]:
    place = folder / f"{job}-{rows}"
    place.mkdir()
    command = [sys.executable, "-m", "tests.benchmarks.rows_once", job, str(rows), str(place)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
