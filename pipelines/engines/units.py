"""Units in, receipts out: the units of a job, shared out among the members of a team.

    job = Job("gradients", folder, store.missing_units(), store.written)
    for unit in taken(job):
        ...  # compute the unit and commit it, whole

A process that works by itself gets all units in order. The members of a team lease them, one at a time. A unit is
computed at least once: the lease of a member that dies is free again, and another member takes the unit. Two members
that compute the same unit write the same bytes. The loop ends in every member when all units are committed.
"""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from datatools import DataError, files
from pipelines.runs import current, following, workers
from pipelines.runs.run_files import WORKERS
from pipelines.settings.base import Json


@dataclass(frozen=True)
class Job:
    """Work that is done when all its units are committed.

    Attributes:
        name: What receipts call it.
        folder: The folder in which results are committed.
        missing: The numbers of the units that are not committed.
        committed: Returns whether a unit is committed.
        found: Called with each unit that another member has committed.
    """

    name: str
    folder: Path
    missing: Sequence[int]
    committed: Callable[[int], bool]
    found: Callable[[int], object] = lambda unit: None


@dataclass(frozen=True)
class Receipt:
    """What remains of a unit besides its result.

    Attributes:
        job: The name of the job.
        unit: The number of the unit.
        worker: The member that computed it.
        seconds: How long this took.
    """

    job: str
    unit: int
    worker: str
    seconds: float


def taken(job: Job) -> Iterator[int]:
    """Yield the units that this process has to compute; each must be committed before the next one is asked for.

    Args:
        job: The job.

    Raises:
        Orphaned: In a member that helps: the leader has ended.
    """
    member = workers.member()
    leases = _leases(job.folder, job.name)
    if member is None:
        forget(job.folder, job.name)
        yield from job.missing
    elif member.leads:
        files.make_folder(job.folder)
        with files.Leases(leases) as held:
            yield from _shared(job, held, member)
        files.remove(leases)
        _report(job)
    else:
        following.until(lambda: leases.exists() or _is_done(job))
        try:
            held = files.Leases(leases, create=False)
        except DataError:  # all units were committed just now
            held = None
        if held is not None:
            with held:
                yield from _shared(job, held, member)
        following.until(lambda: _is_done(job))


def _leases(folder: Path, name: str) -> Path:
    return folder / f".leases-{name}"


def forget(folder: Path, name: str) -> None:
    """Remove what a team that was killed has left of its leases.

    Args:
        folder: The folder of a job.
        name: Its name.
    """
    if (path := _leases(folder, name)).exists():
        files.remove(path)


def _is_done(job: Job) -> bool:
    return all(map(job.committed, job.missing))


def _shared(job: Job, leases: files.Leases, member: workers.Member) -> Iterator[int]:
    """Lease units until all are committed. Members begin at different places, so that they seldom meet."""
    start = len(job.missing) * member.place // max(1, member.size) % max(1, len(job.missing))
    left = dict.fromkeys([*job.missing[start:], *job.missing[:start]])
    for _ in following.pauses():
        busy = True
        while left and busy:
            busy = False
            for unit in list(left):
                if job.committed(unit):
                    del left[unit]
                    job.found(unit)
                elif leases.take(unit):
                    try:
                        if not job.committed(unit):  # its lease was given back just now
                            began = time.monotonic()
                            yield unit
                            _keep(Receipt(job.name, unit, member.name, round(time.monotonic() - began, 3)))
                            del left[unit]
                            busy = True
                    finally:
                        leases.give_back(unit)
                    following.check_leader()
        if not left:
            return
        following.check_leader()


def _keep(receipt: Receipt) -> None:
    folder = current.last_folder()
    if folder is not None:
        files.append_line(folder / WORKERS / f"{receipt.worker}.jsonl", json.dumps(vars(receipt)))


def _report(job: Job) -> None:
    """Write to the events of the run how many units each member has computed."""
    run = current.run()
    if run is not None and (counts := receipts(job.name)):
        by: dict[str, Json] = dict(sorted(counts.items()))
        run.event("units", job=job.name, by=by)


def receipts(job: str) -> Counter[str]:
    """Count the receipts of a job in the folder of the current run, over all attempts.

    Args:
        job: The name of the job.

    Returns:
        Member -> the number of its units.
    """
    found: Counter[str] = Counter()
    folder = current.last_folder()
    for path in sorted((folder / WORKERS).glob("*.jsonl")) if folder is not None else ():
        for line in files.read_bytes(path).split(b"\n")[:-1]:
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["job"] == job:
                    found[str(entry["worker"])] += 1
    return found


def own_name(label: str) -> str:
    """Return a name for this process that no other member has, and that does not say on which machine it runs.

    Args:
        label: What the engine calls it, such as "rank-3".
    """
    here = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    return f"{label}-{files.digest(here.encode())[:6]}"
