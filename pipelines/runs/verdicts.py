"""Which selection an audit judged: its verdict belongs to the bytes of one `selected.jsonl`, and to no other.

An audit records the digest of the file that it read. Whoever shows its verdict compares that with the selection that is
there: `select` keeps the verdict of an equal selection, `audit` writes none into the report of a changed one, and the
report leaves out one that is not its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from datatools import DatatoolsError, files
from pipelines.runs.messages import warn

SELECTED = "selected.jsonl"
_ASIDE = ("selected.parquet", "scores.parquet", "summary.json", "report.html", SELECTED)  # last: a kill resumes here


def digest_of(folder: Path) -> str | None:
    """The digest of the selection in `folder`; None where there is none."""
    path = folder / SELECTED
    return files.digest_file(path) if path.is_file() else None


def digest_of_lines(lines: Iterable[bytes]) -> str:
    """The digest that a file of these lines will have."""
    state = xxhash.xxh3_128()
    for line in lines:
        state.update(line + b"\n")
    return state.hexdigest()


def _judges(audit: object, digest: str | None, *, unsigned: bool) -> bool:
    """Whether `audit` judged the selection with this digest; unsigned: the answer for one that does not say which."""
    if not isinstance(audit, Mapping):
        return False
    return audit.get("selection") == digest if "selection" in audit else unsigned


def kept(folder: Path, digest: str) -> dict[str, Any] | None:
    """The audit of the selection with this digest that is in `folder` already: in its summary, or in its `audit/`.

    Audits of earlier versions do not say what they judged: they count where the selection on disk is still the same.
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
    """Move a finished selection other than the one with this digest to `selected.old-N` in `folder`, and say so.

    Returns: where it is now; None where nothing had to move.
    """
    there = digest_of(folder)
    if there is None or there == digest:
        return None
    number = 1
    while (folder / f"selected.old-{number}" / SELECTED).exists():
        number += 1
    aside = folder / f"selected.old-{number}"
    files.make_folder(aside)
    for name in _ASIDE:
        if (folder / name).is_file():
            files.move(folder / name, aside / name)
    warn(f"this selection differs from the earlier one in this folder, which is now in {aside}")
    return aside


def deliver(home: Path, audit: Mapping[str, Any]) -> bool:
    """Write `audit` into the summary of the selection in the run folder `home`; True if it is that selection's.

    Says why where it is not: the audit is of another file, the selection has changed since it was read, or a command
    works on it right now.
    """
    if not ((home / "summary.json").is_file() and (home / "scores.parquet").is_file()):
        return False
    try:
        with files.lock_folder(home):
            summary = files.read_json(home / "summary.json")
            if not isinstance(summary, dict):
                warn(
                    f"{home / 'summary.json'} is damaged: the audit is not in its report; `datatools select` again "
                    "with the same settings writes it anew"
                )
                return False
            if digest_of(home) != audit["selection"]:
                warn(
                    f"the audit judged another selection than {home / SELECTED} as it is now: its verdict is kept "
                    "with the audit and is not in that report"
                )
                return False
            files.write_json(home / "summary.json", {**summary, "audit": dict(audit)})
    except DatatoolsError as error:
        warn(f"the verdict is not in the report of {home}: {error}; the same audit again puts it there")
        return False
    return True


def checked(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` without an audit of another selection, and with a warning where something does not belong together."""
    recorded = summary.get("selection")
    described = recorded.get("digest") if isinstance(recorded, Mapping) else None
    there = digest_of(folder)
    found = dict(summary)
    warnings: list[str] = []
    if described is not None and there is not None and described != there:
        warnings.append(f"{SELECTED} has changed since it was selected: this report does not describe its rows.")
    digest = there or described
    if summary.get("audit") and digest is not None and not _judges(summary["audit"], digest, unsigned=True):
        found["audit"] = None
        warnings.append("An audit of another selection is recorded here; its verdict is not shown.")
    return found | ({"warnings": [*(summary.get("warnings") or []), *warnings]} if warnings else {})
