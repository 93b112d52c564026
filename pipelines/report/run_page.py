"""The page of a run folder without a result that has its own page: what ran, its progress, and why it stopped.

Such a run was killed, failed or is still running, or its result is a file for other commands. Every file may be
missing or damaged; its part of the page is then omitted.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from datatools import DatatoolsError, EnvironmentProblem, files
from pipelines.report import page as report
from pipelines.report.summary import stages
from pipelines.report.values import Json, finite, listing, mapping
from pipelines.runs.redact import redact
from pipelines.texts import size

_MOST = 16_000_000  # bytes of a file that are read
_SHOWN = 40
_HIDDEN = {".lock", "report.html"}
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
    noted = mapping(_json(folder / "progress.json"))
    known = mapping(_json(folder / "provenance.json"))
    settings = _text(folder / "run.yaml", told=True)
    first = re.match(r"# Replays this run: datatools ([a-z-]+) ", settings)
    command = first[1] if first else str(known.get("command") or noted.get("command") or "run")
    state = str(noted.get("state"))
    if state == "running" and not _in_use(folder):
        state = "killed"
    events = _events(folder / "events.jsonl")
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
        "warnings": list(dict.fromkeys(str(e.get("text")) for e in events if e.get("event") == "warning"))[:_SHOWN],
        "stages": stages([e for e in events if e.get("event") == "stage_end"]),
        "entries": _entries(folder),
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


def _json(path: Path) -> Any:
    try:
        return files.read_json(path, limit=_MOST)
    except DatatoolsError:
        return None


def _text(path: Path, *, told: bool = False) -> str:
    """Return the content of a file; if it cannot be read, nothing, or the reason with `told`."""
    try:
        return files.read_bytes(path, limit=_MOST).decode("utf-8", "replace")
    except DatatoolsError as error:
        return str(error) if told else ""


def _events(path: Path) -> list[Json]:
    found = []
    for line in _text(path).splitlines():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):  # a kill cut it
            continue
    return listing(found)


def _entries(folder: Path) -> list[tuple[str, str]]:
    """Return (name, size) of the entries of the folder."""
    try:
        there = sorted(entry for entry in folder.iterdir() if entry.name not in _HIDDEN)
        named = [(f"{e.name}/" if e.is_dir() else e.name, "" if e.is_dir() else size(e.lstat().st_size)) for e in there]
    except OSError:
        return []
    return named[:_SHOWN] + ([(f"and {len(named) - _SHOWN} more", "")] if len(named) > _SHOWN else [])
