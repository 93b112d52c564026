"""Peak memory of extraction must not depend on the number of rows."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.measure import Report, Settings, interleaved
from tests.benchmarks.workload import pool_name
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.bench

MIB = 2**20


def test_memory(bench: Settings, tmp_path: Path) -> None:
    small = bench.size(16, 256)
    large = 4 * small
    runs = iter(range(10**6))

    def extraction_of(rows: int) -> dict[str, Any]:
        folder = tmp_path / str(next(runs))
        folder.mkdir()
        return extract_once(folder, rows)

    arms = {"N rows": lambda: extraction_of(small), "4 N rows": lambda: extraction_of(large)}
    samples = interleaved(arms, bench.times(2), bench.seconds)
    report = Report("memory", "Peak memory of extraction for N and 4 N rows", bench)
    few, many = ([sample.value for sample in samples[name]] for name in ("N rows", "4 N rows"))
    report.workload = {
        "rows from": pool_name(bench),
        "N": few[0]["rows"],
        "4 N": many[0]["rows"],
        "tokens of N": few[0]["tokens"],
        "tokens of 4 N": many[0]["tokens"],
        "longest row of N": few[0]["longest"],
        "longest row of 4 N": many[0]["longest"],
    }
    for name, found in (("N", few), ("4 N", many)):
        report.add(f"{name} rows: resident before extraction", middle(found, "before") / MIB, "MiB")
        report.add(f"{name} rows: peak during extraction", middle(found, "peak") / MIB, "MiB")
        taken = statistics.median(f["peak"] - f["before"] for f in found)
        report.add(f"{name} rows: peak above what was resident", taken / MIB, "MiB")
    growth = middle(many, "peak") - middle(few, "peak")
    report.add("growth of the peak from N to 4 N rows", growth / MIB, "MiB")
    report.add("growth of the peak", 100 * growth / middle(few, "peak"), "%")
    report.notes.append(
        "Each extraction runs in a process of its own. Resident memory is the kernel's count; the peak is its "
        "high-water mark"
        + (", reset after the model was loaded" if few[0]["reset"] else " over the whole process")
        + ". One unit of features (float32) is held until it is written; with the default plan of 64 units, 16 rows at "
        "least, a unit grows with the rows once there are more than 1,024 of them, up to 16,384 rows."
    )
    report.keep(samples)
    report.write(tmp_path)


def middle(found: list[dict[str, Any]], field: str) -> float:
    return statistics.median(f[field] for f in found)


def extract_once(folder: Path, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.extract_once", str(folder), str(rows)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
