"""All that needs a GPU, in one unattended run of less than 8 minutes: `make gpu`, or `python -m tests.gpu`.

It runs the tests marked `gpu`, compares every Triton kernel with torch's operations at a large size, times both, and
writes `results/gpu-NAME.json` with the time that memory and arithmetic of an H100 would allow. What does not fit into
the time is named in the file. The exit status is 1 if a test failed or a kernel differs, and 2 without a GPU.

`--dry` runs the same on a machine without a GPU: small sizes, by Triton's interpreter, without tests and times.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1]
LIMIT = 450
"""Seconds after which nothing is begun; the longest thing that was begun takes less than the rest of 8 minutes."""

TESTS = 240
"""Seconds that the tests may take."""

PLACES = ("tests/optim", "tests/datatools")


def run_tests() -> dict[str, Any]:
    """The tests marked `gpu`: how many passed, failed and were skipped, and the lines of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not bench", "-p", "no:cacheprovider", *PLACES]
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "OPTIM_BACKEND")}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=TESTS)
        text, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        text, status = partial.decode() if isinstance(partial, bytes) else partial, 124
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text[-2000:])}
    lines = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    seconds = round(time.monotonic() - start, 1)
    return {
        "status": status,
        "seconds": seconds,
        "counts": counts,
        "failed": lines,
        "end": text[-2000:] if status else "",
    }


def measure(device: torch.device, scale: int, way: str, begun: float, limit: float) -> list[dict[str, Any]]:
    """One entry per kernel: how far it is from torch's operations, and how long both take on a GPU."""
    from tests.benchmarks.kernels import predicted, works
    from tests.benchmarks.test_kernels import arms, seconds

    expected = {(work.name, work.size): predicted(work.counts)[0] for work in works()}
    by_way: dict[str, list[tuple[Callable[[], Any], Any]]] = {}
    entries: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        if way == "triton":
            patch.setenv("TRITON_INTERPRET", "1")  # Triton reads it at every launch
        for chosen in (way, "torch"):
            patch.setenv("OPTIM_BACKEND", chosen)
            by_way[chosen] = [(call, row) for _, call, row, _ in arms(device, scale)]
        for i, (name, _, row, tolerance) in enumerate(arms(device, 64)):
            entry: dict[str, Any] = {"kernel": name, "allowed": tolerance}
            entries.append(entry)
            if time.monotonic() - begun > limit:
                entry["left_out"] = "no time was left"
                continue
            try:
                found = {}
                for chosen, calls in by_way.items():
                    patch.setenv("OPTIM_BACKEND", chosen)
                    found[chosen] = calls[i][0]().float().clone()
                want = found["torch"]
                apart = float((found[way] - want).norm() / want.norm().clamp(min=1e-30))
                entry["apart"], entry["agrees"] = apart, apart <= tolerance
                if device.type == "cuda":
                    for chosen, calls in by_way.items():
                        patch.setenv("OPTIM_BACKEND", chosen)
                        key = "torch_us" if chosen == "torch" else "kernel_us"
                        entry[key] = round(1e6 * seconds(calls[i][0], 20), 1)
                    if row is not None and scale == 1:
                        entry["predicted_for_h100_us"] = round(1e6 * expected[row], 1)
            except Exception as error:  # the other kernels are still measured, and this one is reported
                entry["agrees"], entry["error"] = False, f"{type(error).__name__}: {error}"
    return entries


def facts(device: torch.device) -> dict[str, Any]:
    """What ran."""
    from optim import backend

    found = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(backend.triton, "__version__", None),
        "device": "interpreter",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run everything, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="small sizes by Triton's interpreter, without a GPU")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the results (default: results)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds after which nothing is begun ({LIMIT})")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    if given.dry:
        from optim import backend

        if not backend.interpreted:
            print("make gpu, dry: triton is not installed, or TRITON_INTERPRET=1 was not set before", file=sys.stderr)
            return 2
        device, tests = torch.device("cpu"), None
    elif not torch.cuda.is_available():
        print(
            "make gpu: torch finds no GPU; `python -m tests.gpu --dry` runs the same in the interpreter",
            file=sys.stderr,
        )
        return 2
    else:
        device = torch.device("cuda", 0)
        tests = run_tests()
    try:
        kernels = measure(device, 64 if given.dry else 1, "triton" if given.dry else "auto", begun, given.limit)
    except Exception as error:  # such as too little memory for the inputs; the results of the tests are still written
        kernels = [{"kernel": "all", "agrees": False, "error": f"{type(error).__name__}: {error}"}]
    what = facts(device)
    body = {
        "facts": what,
        "seconds": round(time.monotonic() - begun, 1),
        "tests": tests,
        "kernels": kernels,
    }
    name = re.sub(r"[^a-z0-9]+", "-", what["device"].lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-{name}.json"
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    for entry in kernels:
        times = "  ".join(
            f"{key} {entry[key]}" for key in ("kernel_us", "torch_us", "predicted_for_h100_us") if key in entry
        )
        state = entry.get("left_out") or entry.get("error") or ("agrees" if entry["agrees"] else "DIFFERS")
        print(f"{entry['kernel']}: {state}  {times}")
    if tests is not None:
        print(f"tests: {tests['counts']}, status {tests['status']}, {tests['seconds']} s")
    print(f"written to {path}")
    return int(any(entry.get("agrees") is False for entry in kernels) or (tests is not None and tests["status"] != 0))


if __name__ == "__main__":
    if "--dry" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read when optim is first imported
    sys.exit(main())
