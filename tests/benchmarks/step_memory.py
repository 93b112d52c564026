"""What a step of one optimizer holds and adds, in a process of its own; `test_matrices` and `test_compressed` run it.

    python -m tests.benchmarks.step_memory NAME ARM

NAME: muon, or one of `test_compressed`; ARM: one of its arms. Prints one line of JSON: the bytes of all tensors beside
parameters and gradients after the first step, and the kernel's high-water mark of the second one above what was
resident before it.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter

from tests.benchmarks.measure import Report, Settings, peak_bytes
from tests.conftest import REPOSITORY

Make = Callable[[list[Parameter]], torch.optim.Optimizer]


def measured(name: str, make: Make, params: list[Parameter]) -> dict[str, Any]:
    before = _storages()
    optimizer = make(params)
    optimizer.step()
    held = sum(size for at, size in _storages().items() if at not in before)
    return {"name": name, "held": held, "grown": peak_bytes(optimizer.step)}


def _storages() -> dict[int, int]:
    """Address -> bytes of everything that a tensor of this process holds on the CPU."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, Parameter)]
    tensors += [p.grad for p in tensors if isinstance(p, Parameter) and p.grad is not None]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def add_rows(report: Report, name: str, arms: Iterable[str], parameters: int) -> None:
    """Rows of memory for each arm, the first of them ours."""
    for arm in arms:
        found = once(name, arm)
        if found["grown"] is None:
            report.notes.append(f"{name}: this system does not tell the peak of a step.")
            return
        label = arm if arm == name else f"{name}: {arm}"
        report.add(f"{label}: tensors held", found["held"] / parameters, "bytes a parameter")
        report.add(f"{label}: peak, state and what a step adds", (found["held"] + found["grown"]) / 2**20, "MiB")


def once(name: str, arm: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.step_memory", name, arm]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(name: str, arm: str) -> None:
    from tests.benchmarks import test_compressed, test_matrices

    settings = Settings.read()
    report = Report("", "", settings)
    module: Any = test_matrices if name == "muon" else test_compressed
    params = module.stepped(name, settings.model == "tiny")
    print(json.dumps(measured(name, module.arms(name, report)[arm], params)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
