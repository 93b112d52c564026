"""What an optimizer holds and adds in its first step, initialisation included, above parameter and gradient.

    python -m tests.benchmarks.first_step_memory [MILLIONS] [NAME ...]

One tensor of so many million entries; each optimizer in a process of its own; the kernel's high-water mark.
"""

import json
import os
import subprocess
import sys

import torch

from tests.benchmarks.measure import peak_bytes
from tests.conftest import REPOSITORY

NAMES = ("adamw", "adamw_8bit", "lion", "lion_8bit")


def once(name: str, millions: int) -> float:
    """Bytes a parameter."""
    from optim import create

    for size in (1 << 14, millions * 1_000_000):  # the small one compiles
        p = torch.nn.Parameter(torch.ones(size // 1000, 1000))
        p.grad = torch.full_like(p, 1e-3)
        optimizer = create(name, [("p", p)], lr=1e-3)
        grown = peak_bytes(optimizer.step)
    assert grown is not None, "this system does not tell the peak of a step"
    return grown / p.numel()


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--once"]:
        print(json.dumps(once(arguments[1], int(arguments[2]))))
        return
    millions = int(arguments[0]) if arguments else 50
    for name in arguments[1:] or NAMES:
        command = [sys.executable, "-m", "tests.benchmarks.first_step_memory", "--once", name, str(millions)]
        done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, check=True)
        print(f"{name}: {json.loads(done.stdout.splitlines()[-1]):.2f} bytes a parameter of {millions} million")


if __name__ == "__main__":
    main(sys.argv[1:])
