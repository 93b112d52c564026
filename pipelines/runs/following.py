"""What a member of a team reads of the run that another process leads, and how it waits for that process.

The run folder is the only channel. The leader holds the lock of the folder; when it has opened the run, it writes
`workers/ready.json` with the name of its lock, so that the others index rows with it. A member compares its own code
and inputs with the leader's records before it computes anything else. When the lock is free, the leader has ended:
`Orphaned` takes the member back to `pipelines.engines`, where it may take the lead.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datatools import DataError, DatatoolsError, files
from pipelines.runs import current
from pipelines.runs.events import PROGRESS, now, read_progress
from pipelines.runs.run_files import WORKERS, shown
from pipelines.runs.workers import helps, member
from pipelines.settings.base import Json
from pipelines.settings.dump import flatten
from pipelines.texts import visible

SHORTEST, LONGEST = 0.05, 0.5
"""The first and the longest pause of a process that waits for others, in seconds."""

_READY = "ready.json"
_INPUTS = "inputs"
"""What the leader has reached when it has recorded its inputs."""
_PATIENCE = 5
"""How often a record is read again that the leader replaces at the same moment."""

_leader: str | None = None
"""The holder of the run's lock that this member has joined, or this process itself."""

_welcomed: Path | None = None
"""The folder of the run that this process leads, between `welcome` and `begin`."""

_marks: list[str] = []
"""What this leader has reached."""

_earlier: set[str] = set()
"""The receipts of earlier attempts, when this process began to lead."""


class Orphaned(Exception):
    """The leader of the run has ended, or another one has taken its place."""


class Enough(Exception):
    """All shared work is done; the leader does the rest."""


def welcome(folder: Path) -> None:
    """In the leader of a team, let the others read the inputs too: the run is open, and its code is recorded.

    Args:
        folder: The folder of the run.
    """
    global _leader, _welcomed
    if (one := member()) is None or not one.leads:
        return
    _leader, _welcomed = files.holder(folder), folder
    _marks.clear()
    files.make_folder(folder / WORKERS)
    _earlier.clear()
    _earlier.update(path.name for path in (folder / WORKERS).glob("*.jsonl"))
    _write_marks(folder)


def begin(folder: Path) -> None:
    """In the leader of a team, let the others begin: the inputs of this run are read and recorded.

    Args:
        folder: The folder of the run.
    """
    global _welcomed
    if (one := member()) is None or not one.leads:
        return
    if _welcomed != folder:
        welcome(folder)
    _welcomed = None
    _marks.append(_INPUTS)
    _write_marks(folder)


def working() -> int:
    """Return how many members have computed something in this attempt; in the leader only."""
    folder = current.last_folder()
    found = (folder / WORKERS).glob("*.jsonl") if folder is not None else ()
    return sum(path.name not in _earlier for path in found)


def _write_marks(folder: Path) -> None:
    marks: list[Json] = [*_marks]
    ready: dict[str, Json] = {"leader": _leader, "updated": now(), "reached": marks}
    files.write_json(folder / WORKERS / _READY, ready, durable=False)


def _reached(folder: Path) -> list[str] | None:
    """Return what the leader has reached; None before it is ready."""
    with suppress(DatatoolsError):  # missing, or of another file system's cache
        found = files.read_json(folder / WORKERS / _READY)
        if found.get("leader") == _leader:
            return list(found["reached"])
    return None


def reached(what: str) -> None:
    """Wait, in a member that helps, until the leader has made something; in the leader, say that it is made.

    Args:
        what: What has been made, such as "warm-up".

    Raises:
        Orphaned: The leader ended before.
    """
    one, folder = member(), current.last_folder()
    if one is None or folder is None:
        return
    if not one.leads:
        until(lambda: what in (_reached(folder) or ()))
    elif what not in _marks:
        _marks.append(what)
        _write_marks(folder)


def leader_has_inputs() -> bool:
    """Wait, in a member that has failed, until the leader has recorded its inputs; False if it ended before.

    Whatever is wrong with the rows is wrong for all members, and the leader alone reports it.
    """
    try:
        reached(_INPUTS)
    except Orphaned:
        return False
    return True


def join(folder: Path) -> dict[str, Any]:
    """Wait until the leader of a run lets others in, and return the run's provenance.

    Args:
        folder: The folder of the run.

    Raises:
        Orphaned: There is no leader.
    """
    global _leader
    for _ in pauses():
        _leader = files.holder(folder)
        if _leader is None:
            raise Orphaned
        if _reached(folder) is not None:
            break
    current.opened(folder)
    return _provenance(folder)


def _provenance(folder: Path) -> dict[str, Any]:
    found: dict[str, Any]
    for _ in range(_PATIENCE):
        with suppress(DatatoolsError):
            found = files.read_json(folder / "provenance.json", limit=64_000_000)
            return found
        time.sleep(SHORTEST)
    found = files.read_json(folder / "provenance.json", limit=64_000_000)
    return found


def compare(folder: Path, facts: Mapping[str, Json], accept: tuple[str, ...], *, early: bool = False) -> None:
    """Refuse to help if code, libraries, model or rows differ from the leader's.

    Args:
        folder: The folder of the run.
        facts: The facts of this process, by group.
        accept: Groups that may differ.
        early: Whether the leader records these facts when it opens the run; it records others with its inputs, for
            which this waits.

    Raises:
        DataError: A fact differs; the message names it and both values.
        Orphaned: The leader ended before it had recorded its inputs.
    """
    if not early:
        reached(_INPUTS)
    recorded = _provenance(folder)["facts"]
    odd = []
    for group, value in facts.items():
        if group in accept or group not in recorded:
            continue
        mine, theirs = flatten(value, group), flatten(recorded[group], group)
        odd += [name for name in dict.fromkeys([*theirs, *mine]) if mine.get(name) != theirs.get(name)]
        if odd:
            told = "; ".join(f"{name} is {_shown(mine.get(name))} here, {_shown(theirs.get(name))} there"
                             for name in odd[:3])  # fmt: skip
            one = member()
            raise DataError(
                f"worker {one.name if one else ''} cannot help with the run in {shown(folder)}, which another process "
                f"leads: {told}. All workers need the same code, libraries, threads and input files"
            )


def _shown(value: Json) -> str:
    text = visible(str(value)) if value is not None else "missing"
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------------------- waiting


def pauses() -> Iterator[None]:
    """Yield again and again, after pauses that grow from `SHORTEST` to `LONGEST`."""
    seconds = SHORTEST
    while True:
        yield
        time.sleep(seconds)
        seconds = min(LONGEST, 1.5 * seconds)


def until(condition: Callable[[], bool]) -> None:
    """In a member that helps, wait until the leader has done something; in any other process, return at once.

    Args:
        condition: Whether it is done.

    Raises:
        Orphaned: The leader ended before it was done.
    """
    if not helps():
        return
    for _ in pauses():
        if condition():
            return
        check_leader()


def check_leader() -> None:
    """In a member that helps, raise `Orphaned` if the leader that it has joined has ended."""
    folder = current.last_folder()
    if helps() and folder is not None and files.holder(folder) != _leader:
        raise Orphaned


def leave() -> None:
    """End the part of a member that helps: the leader does the rest by itself. In any other process, do nothing."""
    if helps():
        raise Enough


def outcome(folder: Path) -> tuple[str, str]:
    """Return the state of a run ("done", "failed", "interrupted" or "running") and the error that ended it.

    Args:
        folder: The folder of the run.
    """
    for _ in range(_PATIENCE):
        with suppress(DatatoolsError):
            if not (folder / PROGRESS).is_file():
                return "running", ""
            found = read_progress(folder)
            return str(found.get("state")), str(found.get("error") or "")
        time.sleep(SHORTEST)
    return "running", ""
