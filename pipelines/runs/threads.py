"""Threads of the numeric libraries: how many, and how idle ones wait. Chosen before torch is loaded, once a process.

An idle OpenMP thread of torch spins for 300,000 rounds before it sleeps, on a core that another run may need: two runs
on one machine then wait for each other's idle threads. `tests/benchmarks/test_side_by_side.py` measures both ways.
What the user has set is never touched. Nothing here imports torch.
"""

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

SPINS = 1000
"""Rounds of an idle thread before it sleeps: some ten microseconds, about what waking it costs."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
"""Variables by which a user says how many threads there are to be."""

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user says how idle threads wait; the first is of GNU's library, the last two are of LLVM's."""

chosen: dict[str, str] = {}
"""What `choose` has set in this process."""

_commands = False
"""Whether a command chose, before torch was loaded."""


def choose(environ: MutableMapping[str, str] = os.environ, *, command: bool = False) -> dict[str, str]:
    """Set what the user has not: brief spinning, and no more threads than the cores that this process may use.

    command: whether the process is a command's, in which nobody else sets the number of threads later.
    Returns what was set; nothing where torch is loaded already, which is too late. For a script or a notebook that
    shares its machine: call this first, before torch is imported.
    """
    global _commands
    if "torch" in sys.modules:
        return {}
    _commands = command
    found: dict[str, str] = {}
    if not any(name in environ for name in WAITING):
        found |= {"GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": "1"}  # the second in milliseconds, 200 by default
    if not any(name in environ for name in COUNTS):
        allowed, share = cores(), _share(environ)
        if share < allowed or allowed < _affinity():
            found["OMP_NUM_THREADS"] = str(min(share, allowed))
    environ.update(found)
    chosen.update(found)
    return found


def _share(environ: Mapping[str, str]) -> int:
    """Cores for each worker of this machine, where a launcher that sets no OMP_NUM_THREADS started several."""
    workers = environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores() // max(1, int(workers))) if workers.isdecimal() else cores()


def count_is_users(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the number of threads is what the user asked for."""
    return any(name in environ and name not in chosen for name in COUNTS)


def count_is_free() -> bool:
    """Whether the number of threads is a command's to choose: neither a user nor a caller's code has set it."""
    return _commands and not count_is_users()


def waits_briefly(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether idle threads leave their core soon, as far as the environment says."""
    spins = environ.get("GOMP_SPINCOUNT", "").strip()
    if spins:
        return spins.isdecimal() and int(spins) <= 4 * SPINS
    return environ.get("OMP_WAIT_POLICY", "").strip().upper() == "PASSIVE"


# --------------------------------------------------------------------------------------------------------------- cores


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, and the quotas of its control groups (of both versions)."""
    found = [float(_affinity())]
    for folder in _groups(root):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()  # "max" is no number: no limit
            found.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = (
                (folder / f"cpu.cfs_{what}_us").read_text(encoding="ascii") for what in ("quota", "period")
            )
            if int(quota) > 0:
                found.append(int(quota) / int(period))
    return max(1, math.ceil(min(found)))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(root: Path) -> list[Path]:
    """Folders that may hold a quota: of the group of this process and of those above it; in a container, the top."""
    top = root / "sys/fs/cgroup"
    found = [top, top / "cpu", top / "cpu,cpuacct"]
    with suppress(OSError, UnicodeError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            for base in (top / controllers, top / "cpu") if controllers else (top, top / "unified"):
                inside = base / place.lstrip("/")
                found += [inside, *(above for above in inside.parents if base in above.parents or above == base)]
    return list(dict.fromkeys(found))
