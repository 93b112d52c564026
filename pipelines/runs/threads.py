"""Threads of the numeric libraries: their number, and how idle ones wait, chosen once before torch is loaded.

An idle OpenMP thread of torch spins for 300,000 rounds before it sleeps, on a core that another run may need. Two runs
on one machine then wait for each other's idle threads; `tests/benchmarks/test_side_by_side.py` measures both settings.
Where that can be watched, threads spin for long only while a run is alone (`waiting.py`); elsewhere they always spin
briefly. Variables that the user has set are never changed. No import here loads torch.
"""

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from pipelines.runs import waiting

SPINS = 1000
"""Rounds that an idle thread spins before it sleeps: about ten microseconds, which is the cost of waking it."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
"""Environment variables by which a user sets the number of threads."""

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables for how idle threads wait: the first is for GNU's library, the last two for LLVM's."""

chosen: dict[str, str] = {}
"""Variables that `choose` has set in this process."""

_commands = False
"""Whether a command called `choose` before torch was loaded."""


def choose(environ: MutableMapping[str, str] = os.environ, *, command: bool = False) -> dict[str, str]:
    """Set how idle threads wait, and at most as many threads as cores, unless the user has set these.

    In a script or a notebook that shares its machine, call this before torch is imported.

    Args:
        environ: The environment variables to read and change.
        command: Whether this process runs a `datatools` command, in which no other code sets the number of threads
            later.

    Returns:
        The variables that were set; empty if torch is already loaded, which is too late.
    """
    global _commands
    if "torch" in sys.modules:
        return {}
    _commands = command
    found: dict[str, str] = {}
    briefly = {"GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": "1"}  # the second in milliseconds, 200 by default
    watched = False
    if not any(name in environ for name in WAITING):
        watched = environ is os.environ and waiting.can_watch()
        found |= waiting.LONG if watched else briefly
    if not any(name in environ for name in COUNTS):
        allowed, share = cores(), _share(environ)
        if share < allowed or allowed < _affinity():
            found["OMP_NUM_THREADS"] = str(min(share, allowed))
    environ.update(found)
    chosen.update(found)
    if watched:
        chosen.update(briefly)
        waiting.Watch(environ, briefly).start()
    return found


def _share(environ: Mapping[str, str]) -> int:
    """Return the number of cores per worker, if a launcher started several workers without setting OMP_NUM_THREADS."""
    workers = environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores() // max(1, int(workers))) if workers.isdecimal() else cores()


def count_is_users(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the user has set the number of threads.

    Args:
        environ: The environment variables.
    """
    return any(name in environ and name not in chosen for name in COUNTS)


def count_is_free() -> bool:
    """Return whether a command may choose the number of threads: neither the user nor calling code has set it."""
    return _commands and not count_is_users()


def waits_briefly(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether idle threads release their core quickly, according to the environment.

    Args:
        environ: The environment variables.
    """
    spins = environ.get("GOMP_SPINCOUNT", "").strip()
    if spins:
        return spins.isdecimal() and int(spins) <= 4 * SPINS
    return environ.get("OMP_WAIT_POLICY", "").strip().upper() == "PASSIVE"


# --------------------------------------------------------------------------------------------------------------- cores


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use: by its affinity and the quotas of its control groups.

    Args:
        root: The root of the file system; tests give another one.
    """
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
    """Return the folders that may contain a quota, for the control group of this process and its parents."""
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
