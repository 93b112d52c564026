"""The page of a run folder without a result that has its own page: what ran, its progress, and why it stopped.

Such a run was killed, failed or is still running, or its result is a file for other commands. Every file may be
missing or damaged; its part of the page is then omitted, and a damaged one is named there and in the terminal.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatools import DatatoolsError, EnvironmentProblem, files
from datatools.files import seals
from pipelines.report import page as report
from pipelines.report.summary import stages
from pipelines.report.values import Json, finite, listing, mapping
from pipelines.runs.events import NAME, PROGRESS, entries, read_progress
from pipelines.runs.messages import warn
from pipelines.runs.redact import redact
from pipelines.runs.run_files import shown
from pipelines.texts import size

_MOST = 16_000_000  # bytes of a file that are read
_SHOWN = 40
_HIDDEN = {".lock", "report.html", seals.NAME}
_READ = {"progress.json", "provenance.json", "events.jsonl", "run.yaml"}
_ENDED = {"done", "failed", "interrupted"}
"""States whose name is the last event of the run."""
_STATES = {
    "done": "is done",
    "running": "is running",
    "killed": "was stopped before it finished",
    "interrupted": "was interrupted",
    "failed": "failed",
}


def render(folder: Path) -> Path:
    """Draw folder/report.html from the records of the run.

    Args:
        folder: The folder of the run.

    Returns:
        The page.
    """
    return report.write_page(folder, report.page("run.html", **_parts(folder)))


def _parts(folder: Path) -> dict[str, Any]:
    damaged: list[str] = []
    noted = mapping(_read(lambda path: read_progress(path.parent), folder / PROGRESS, damaged))
    known = mapping(_read(lambda path: files.read_json(path, limit=_MOST), folder / "provenance.json", damaged))
    settings = (_read(_content, folder / "run.yaml", damaged) or b"").decode("utf-8", "replace")
    first = re.match(r"# Replays this run: datatools ([a-z-]+) ", settings)
    command = first[1] if first else str(known.get("command") or noted.get("command") or "run")
    state = str(noted.get("state"))
    if state == "running" and not _in_use(folder):
        state = "killed"
    events = _events(folder / NAME, state, damaged)
    listed = _entries(folder, damaged)
    for reason in damaged:
        warn(reason)
    argv = known.get("argv")
    again = shlex.join(["datatools", command, redact(str(folder / "run.yaml"), names=False)])
    return {
        "title": f"datatools {command}",
        "command": command,
        "created": str(known.get("created") or "")[:10],
        "headline": f"This run {_STATES.get(state, 'ended in an unknown state')}",
        "lead": _lead(noted, state),
        "again": "" if state == "running" else again,
        "error": str(noted.get("error") or ""),
        "warnings": [*damaged, *dict.fromkeys(str(e.get("text")) for e in events if e.get("event") == "warning")][
            :_SHOWN
        ],
        "stages": stages([e for e in events if e.get("event") == "stage_end"]),
        "entries": listed,
        "argv": shlex.join(["datatools", *map(str, argv)]) if isinstance(argv, list) else "",
        "settings": settings,
        "versions": [(str(k), str(v)) for k, v in mapping(known.get("versions")).items() if v],
    }


def _lead(noted: Json, state: str) -> str:
    doing = mapping(noted.get("doing"))
    said = []
    if state != "done" and doing.get("description"):
        done, total = finite(doing.get("done")), finite(doing.get("total"))
        far = f": {done:,.0f}" + (f" of {total:,.0f}" if total else "") if done is not None else ""
        said.append(f"Its last progress was {doing['description']}{far} {doing.get('unit') or ''}".rstrip() + ".")
    said.append(
        {
            "done": "Its result has no picture; the files are listed below. The same command repeats the run:",
            "running": "It is running in another process.",
        }.get(state, "Finished work is kept, and the same command continues the run:")
    )
    return " ".join(said)


def _in_use(folder: Path) -> bool:
    try:
        with files.lock_folder(folder):
            return False
    except EnvironmentProblem:
        return True


def _read(read: Callable[[Path], Any], path: Path, damaged: list[str]) -> Any:
    """Return the content of a file, if there is one; the reason why it cannot be read is added to `damaged`."""
    try:
        return read(path) if path.is_file() else None
    except DatatoolsError as error:
        damaged.append(str(error))
        return None


def _content(path: Path) -> bytes:
    return files.read_bytes(path, limit=_MOST)


def _events(path: Path, state: str, damaged: list[str]) -> list[Json]:
    found, wrong = entries(_read(_content, path, damaged) or b"")
    if wrong:
        damaged.append(f"{shown(path)}: {wrong} damaged lines were skipped")
    elif path.is_file() and state in _ENDED and (not found or found[-1].get("event") != state):
        damaged.append(f"{shown(path)} ends before the run did: its last lines are lost")
    return listing(found)


def _entries(folder: Path, damaged: list[str]) -> list[tuple[str, str]]:
    """Return (name, size) of the entries of the folder; files that the run did not write so are added to `damaged`."""
    try:
        there = sorted(entry for entry in folder.iterdir() if entry.name not in _HIDDEN)
        named = [(f"{e.name}/" if e.is_dir() else e.name, "" if e.is_dir() else size(e.lstat().st_size)) for e in there]
    except OSError:
        return []
    for entry in there:
        if entry.name not in _READ and entry.is_file() and entry.lstat().st_size <= _MOST:
            _read(_content, entry, damaged)
    return named[:_SHOWN] + ([(f"and {len(named) - _SHOWN} more", "")] if len(named) > _SHOWN else [])
