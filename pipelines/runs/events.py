"""events.jsonl of a run folder: what happened when, and the duration of each stage over all attempts."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datatools import DataError, DatatoolsError, files
from pipelines.runs.messages import say
from pipelines.runs.run_files import shown
from pipelines.settings.base import Json

NAME, PROGRESS = "events.jsonl", "progress.json"


def now() -> str:
    """Return the current time as the files of a run write it: UTC, ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Events:
    """The events of a run and the durations of its stages.

    Args:
        folder: The folder of the run.
        writes: Whether this process writes the events; only rank 0 does.

    Attributes:
        stages: `{"name", "seconds"}` per stage, over all attempts.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self._writes = folder, writes
        self.stages: list[dict[str, Json]] = []
        self._inner: list[float] = []  # seconds of the stages inside each open one

    def add(self, kind: str, /, **fields: Json) -> None:
        """Append one line with a time stamp.

        Args:
            kind: The kind of event.
            **fields: Further values of the event.
        """
        if self._writes:
            files.append_line(self.folder / NAME, json.dumps(with_sum({"time": now(), "event": kind, **fields})))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a named part of the run, and log when it begins and how long it took.

        Args:
            name: The name of the stage.
        """
        say(f"{name} ...")
        self.add("stage", name=name)
        start = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.monotonic() - start
            seconds = round(max(0.0, whole - self._inner.pop()), 3)  # a stage inside counts its own
            if self._inner:
                self._inner[-1] += whole
            self._count(name, seconds)
            with suppress(DatatoolsError):
                self.add("stage_end", name=name, seconds=seconds)

    @property
    def seconds(self) -> float:
        """Seconds of all stages, over all attempts."""
        return math.fsum(seconds for entry in self.stages if isinstance(seconds := entry["seconds"], float))

    def _count(self, name: str, seconds: float) -> None:
        for entry in self.stages:
            if entry["name"] == name:
                before = entry["seconds"]
                entry["seconds"] = round((before if isinstance(before, float) else 0.0) + seconds, 3)
                return
        self.stages.append({"name": name, "seconds": float(seconds)})

    def read(self) -> None:
        """Read the stages of earlier attempts. A line that was cut off by a kill is removed."""
        path = self.folder / NAME
        if not path.is_file():
            return
        lines = files.read_bytes(path, limit=1 << 30).split(b"\n")
        if lines[-1]:  # a kill cut it
            files.write_bytes(path, b"".join(line + b"\n" for line in lines[:-1]), seal=False)
        found, damaged = entries(b"\n".join([*lines[:-1], b""]))
        open_since: dict[str, datetime] = {}
        for entry in found:
            try:
                if entry["event"] == "stage_end":
                    self._count(str(entry["name"]), float(entry["seconds"]))
                    open_since.pop(str(entry["name"]), None)
                elif entry["event"] in ("started", "continued"):
                    open_since = {}
                elif entry["event"] == "stage":
                    open_since[str(entry["name"])] = datetime.fromisoformat(entry["time"])
            except (ValueError, KeyError, TypeError):
                damaged += 1
        if damaged:
            say(f"{shown(path)}: {damaged} damaged lines were skipped; the durations of some stages may be missing")
        if open_since:
            self._count_killed(open_since)

    def _count_killed(self, open_since: Mapping[str, datetime]) -> None:
        """Count the time that a killed attempt spent in its last stage, up to its last progress report."""
        with suppress(DatatoolsError, ValueError, KeyError, TypeError):
            seen = datetime.fromisoformat(read_progress(self.folder)["updated"])
            name = max(open_since, key=lambda stage: open_since[stage])
            seconds = (seen - open_since[name]).total_seconds()
            if seconds > 0:
                self._count(name, round(seconds, 3))
                self.add("stage_end", name=name, seconds=round(seconds, 3), killed=True)


def entries(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Read the lines of an events.jsonl.

    Args:
        data: The content of the file. A last line that was cut off by a kill is ignored.

    Returns:
        The entries, without those that differ from their checksum, and the number of damaged lines.
    """
    found, damaged = [], 0
    for line in filter(None, data.split(b"\n")[:-1]):
        with suppress(ValueError, TypeError, RecursionError):
            entry = json.loads(line)
            if _is_whole(entry) and ("sum" not in entry or json.dumps(entry).encode() == line):
                found.append(entry)
                continue
        damaged += 1
    return found, damaged


def read_progress(folder: Path) -> dict[str, Any]:
    """Read the progress.json of a run.

    Args:
        folder: The folder of the run.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / PROGRESS
    found: dict[str, Any] = files.read_json(path, limit=16_000_000)
    if not _is_whole(found):
        raise DataError(f"{shown(path)} is damaged; the next command that continues the run writes it again")
    return found


def with_sum(entry: dict[str, Json]) -> dict[str, Json]:
    """Add a checksum of the other fields.

    Args:
        entry: An event, or the progress of a run.
    """
    return {**entry, "sum": files.digest(json.dumps(entry).encode())[:16]}


def _is_whole(entry: object) -> bool:
    """Return whether an entry agrees with its checksum; older versions wrote none."""
    if not isinstance(entry, dict):
        return False
    return "sum" not in entry or with_sum({k: v for k, v in entry.items() if k != "sum"}) == entry
