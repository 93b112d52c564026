"""The selection that an audit judged: a verdict belongs to the bytes of one `selected.jsonl` and to no other file.

An audit records the digest of the file that it read. Code that shows its verdict compares this digest with the present
selection: `select` keeps the verdict of an identical selection, `audit` does not write a verdict into the report of a
changed selection, and the report leaves out a verdict that belongs to another selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from datatools import DatatoolsError, files
from pipelines.runs.messages import warn

SELECTED = "selected.jsonl"
_ASIDE = (
    "selected.parquet",
    "scores.parquet",
    "summary.json",
    "weights.yaml",
    "report.html",
    SELECTED,
)  # last: a kill resumes here


def digest_of(folder: Path) -> str | None:
    """Return the digest of the selection in a folder; None if there is none.

    Args:
        folder: The folder of a run.
    """
    path = folder / SELECTED
    return files.digest_file(path) if path.is_file() else None


def digest_of_lines(lines: Iterable[bytes]) -> str:
    """Return the digest that a file of these lines will have.

    Args:
        lines: The lines, without line ends.
    """
    state = xxhash.xxh3_128()
    for line in lines:
        state.update(line + b"\n")
    return state.hexdigest()


def _judges(audit: object, digest: str | None, *, unsigned: bool) -> bool:
    """Return whether `audit` judged the selection with this digest.

    Args:
        audit: The content of audit.json.
        digest: The digest of the selection.
        unsigned: The answer for an audit that does not name its selection.
    """
    if not isinstance(audit, Mapping):
        return False
    return audit.get("selection") == digest if "selection" in audit else unsigned


def kept(folder: Path, digest: str) -> dict[str, Any] | None:
    """Return the stored audit of the selection with this digest, from the summary or from the folder `audit/`.

    Audits of earlier versions do not name their selection. They count if the selection on disk is still the same.

    Args:
        folder: The folder of the run.
        digest: The digest of the selection.
    """
    unsigned = digest_of(folder) == digest
    for path, name in ((folder / "summary.json", "audit"), (folder / "audit" / "audit.json", None)):
        try:
            found = files.read_json(path)
        except DatatoolsError:  # missing or damaged: it says nothing
            continue
        found = found.get(name) if name and isinstance(found, dict) else found
        if isinstance(found, dict) and _judges(found, digest, unsigned=unsigned and name is not None):
            return found
    return None


def set_aside(folder: Path, digest: str) -> Path | None:
    """Move a finished selection other than the one with this digest to `selected.old-N`, and print a warning.

    Args:
        folder: The folder of the run.
        digest: The digest of the new selection.

    Returns:
        The new folder of the earlier selection; None if nothing had to move.
    """
    there = digest_of(folder)
    if there is None or there == digest:
        return None
    # after a kill, the last of the files is still to be moved: into the same folder
    aside = files.free_name(folder / "selected.old", taken=lambda name: (name / SELECTED).exists())
    files.make_folder(aside)
    for name in _ASIDE:
        if (folder / name).is_file():
            files.move(folder / name, aside / name)
    warn(f"this selection differs from the earlier one in this folder, which was moved to {aside}")
    return aside


def deliver(home: Path, audit: Mapping[str, Any]) -> bool:
    """Write an audit into the summary of the selection that it judged.

    A warning states the reason where this is not possible: the audit judged another file, the selection has changed
    since it was read, or another command is using the folder.

    Args:
        home: The folder of the run that made the selection.
        audit: The content of audit.json.

    Returns:
        Whether the audit was written into the summary.
    """
    if not ((home / "summary.json").is_file() and (home / "scores.parquet").is_file()):
        return False
    try:
        with files.lock_folder(home):
            summary = files.read_json(home / "summary.json")
            if not isinstance(summary, dict):
                warn(
                    f"{home / 'summary.json'} is damaged, so the audit is not in its report; run `datatools select` "
                    "again with the same settings to write it"
                )
                return False
            if digest_of(home) != audit["selection"]:
                warn(
                    f"{home / SELECTED} has changed since the audit read it: the verdict is kept "
                    "with the audit and is not in the report of the selection"
                )
                return False
            files.write_json(home / "summary.json", {**summary, "audit": dict(audit)})
    except DatatoolsError as error:
        warn(f"the verdict is not in the report of {home}: {error}; run the same audit again to add it")
        return False
    return True


def checked(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary without an audit of another selection, with warnings about files that do not belong together.

    The warnings are printed, too.

    Args:
        folder: The folder of the run.
        summary: The content of summary.json.
    """
    recorded = summary.get("selection")
    described = recorded.get("digest") if isinstance(recorded, Mapping) else None
    there = digest_of(folder)
    found = dict(summary)
    warnings: list[str] = []
    if described is not None and there is not None and described != there:
        warnings.append(f"{SELECTED} has changed since the selection: this report does not describe its present rows.")
    digest = there or described
    if summary.get("audit") and digest is not None and not _judges(summary["audit"], digest, unsigned=True):
        found["audit"] = None
        warnings.append("The recorded audit belongs to another selection; its verdict is not shown.")
    for text in warnings:
        warn(text)
    return found | ({"warnings": [*(summary.get("warnings") or []), *warnings]} if warnings else {})
