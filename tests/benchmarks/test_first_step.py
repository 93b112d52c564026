"""How long the first step of a rule takes in a process: with compiled steps to be made, and with those of an earlier
process in files (`OPTIM_CACHE`).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from optim import OPTIMIZERS, create
from tests.benchmarks.measure import Report, Settings
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.bench

SHAPES = [(256, 256), (688, 256), (256, 688), (1024, 256), (256,)] * 4
LIMIT = 0.2
"""Seconds of the first step that a later process may take."""


def once(name: str) -> dict[str, float]:
    """Seconds of the first step, and of the fastest of three more."""
    torch.manual_seed(0)
    params = [(f"layer.{i}.weight", torch.nn.Parameter(0.1 * torch.randn(shape))) for i, shape in enumerate(SHAPES)]
    (params[0][1] @ params[0][1]).sum().backward()  # threads and products of torch are ready
    for _, p in params:
        p.grad = 0.01 * torch.randn_like(p)
    optimizer = create(name, params, lr=1e-4)
    took = []
    for _ in range(4):
        begun = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - begun)
    return {"first": took[0], "later": min(took[1:])}


def test_first_step(bench: Settings, tmp_path: Path) -> None:
    report = Report("first_step", "Seconds of the first step of a rule in a process", bench)
    report.workload = {"tensors": len(SHAPES), "parameters": sum(torch.Size(shape).numel() for shape in SHAPES)}
    left_out, seconds = {}, {"first process": [], "second process": []}
    for name in ["adamw", "shampoo"] if bench.model == "tiny" else OPTIMIZERS:
        environment = {**os.environ, "OPTIM_CACHE": str(tmp_path / name), "OMP_NUM_THREADS": "1"}
        found = {}
        for process in seconds:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.test_first_step", name],
                cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            if done.returncode:
                left_out[name] = done.stderr.strip().splitlines()[-1][:120]
                break
            found[process] = json.loads(done.stdout.splitlines()[-1])
        else:
            for process, times in found.items():
                seconds[process].append((times["first"] - times["later"], name))
    for process, times in seconds.items():
        slow, name = max(times)
        limit = LIMIT if process == "second process" else None
        report.add(f"slowest rule ({name}), {process}, above a later step", slow, "s", at_most=limit)
        report.add(f"middle rule, {process}, above a later step", sorted(times)[len(times) // 2][0], "s")
    report.notes.append(f"{len(seconds['second process'])} rules, one process each and one thread.")
    report.notes += [f"Left out: {name} ({why})" for name, why in left_out.items()]
    report.write(tmp_path)


if __name__ == "__main__":
    print(json.dumps(once(sys.argv[1])))
