"""Files that a run folder may contain, and whether they are as the run wrote them; see `datatools.files.seals`."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from datatools import DataError, files
from datatools.files import seals
from pipelines.texts import visible

WORKERS = "workers"
"""The folder in which the processes that share a run leave word for each other."""
OPEN = {seals.NAME, "progress.json", "events.jsonl", ".lock", WORKERS}
"""Names in a run folder that are not sealed, because they change constantly or contain checksums of their own."""
RECORDS = {"run.yaml", "provenance.json", "warmup/rows.json"}
"""Files that cannot be computed again: what ran, and on which rows of the pool at that time."""
COMPLETE = "complete.json"
"""The file that lists its folder's files with their digests, which are compared when the files are used."""
SEALED_SINCE = 2
"""The first format of provenance.json that has seals."""


def sweep(folder: Path) -> None:
    """Remove the files that killed processes left anywhere in a run folder.

    Args:
        folder: The folder of the run.

    Raises:
        DataError: As in `refuse_special`.
    """
    refuse_special(folder)
    for parent, folders, _ in os.walk(folder):
        files.remove_leftovers(parent)
        folders[:] = [name for name in folders if not name.startswith(seals.TEMPORARY)]


def refuse_special(folder: Path) -> None:
    """Refuse a run folder that contains a link, a pipe or a device; the folder itself may be a link.

    Args:
        folder: The folder of the run.

    Raises:
        DataError: The folder contains one; the message names it. Libraries write through links, which may lead
            anywhere.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            child = Path(parent, name)
            with suppress(FileNotFoundError):  # of a process that is writing
                if (kind := _special(child.lstat().st_mode)) is not None:
                    raise DataError(
                        f"{shown(child)} is {kind}; a run folder may contain only files and folders, so nothing was "
                        "written: remove it, or choose another --out"
                    )


def _special(mode: int) -> str | None:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def begin(folder: Path) -> None:
    """Seal the folder of a new run, before its first file.

    Args:
        folder: The folder of the run.
    """
    files.write_bytes(folder / seals.NAME, seals.text({}))
    seals.forget(folder)


def adopt(folder: Path) -> None:
    """Seal the files of a folder as they are.

    Args:
        folder: The folder of the run.
    """
    found = {str(path.relative_to(folder)): [files.seal_of(path)] for path in _believed(folder)}
    files.write_bytes(folder / seals.NAME, seals.text(found))
    seals.forget(folder)


def _believed(folder: Path) -> Iterator[Path]:
    skipped = {"inputs", WORKERS}
    for parent, folders, names in os.walk(folder):
        if "plan.json" in names:  # a feature store, which has its own digests
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(seals.TEMPORARY) and name not in skipped)
        for name in sorted(names):
            if name not in OPEN and not name.startswith(seals.TEMPORARY):
                yield Path(parent, name)


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has seals; a folder from an older version has none.

    Args:
        folder: The folder of a run.

    Raises:
        DataError: The run wrote seals, and they are missing.
    """
    if os.path.lexists(folder / seals.NAME):
        return True
    record = folder / "provenance.json"
    found = files.read_json(record, limit=64_000_000) if record.is_file() else None
    made = found.get("format") if isinstance(found, dict) else None
    if isinstance(made, int) and made >= SEALED_SINCE:
        raise DataError(f"{shown(folder / seals.NAME)} is missing{seals.REMEDY}")
    return False


def note(folder: Path) -> str | None:
    """Return what a reader of a run must know, or None.

    Args:
        folder: The folder of the run.

    Raises:
        DataError: As in `is_sealed`.
    """
    if not (folder / "run.yaml").is_file() or is_sealed(folder):
        return None
    return f"{shown(folder)} was written by a version without seals: changes of its files cannot be detected"


def damaged(folder: Path) -> list[str]:
    """Return the names of existing files that differ from their seals, and remove outdated seals.

    Args:
        folder: The folder of the run.

    Raises:
        DataError: The seals are damaged.
    """
    seals.forget(folder)
    with seals.locked(folder):
        known = seals.seals_of(folder)
        kept, wrong = {}, []
        for name, entries in known.items():
            path = folder / name
            if not path.is_file():
                continue
            kept[name] = entries
            if str(Path(name).parent / COMPLETE) in known:  # compared when it is used, also this list itself
                continue
            seal = files.seal_of(path)
            if seal in entries:
                kept[name] = [seal]
            else:
                wrong.append(name)
        files.write_bytes(folder / seals.NAME, seals.text(kept))
    seals.forget(folder)
    return wrong


def check_saved(folder: Path) -> None:
    """Compare a saved adapter or model with its `complete.json`; folders without this file are not checked.

    Args:
        folder: The folder of the adapter or model.

    Raises:
        DataError: A file was damaged, edited or lost; the message names it.
    """
    path = folder / COMPLETE
    if not path.is_file():
        return
    listed = files.read_json(path)
    if isinstance(listed, dict) and "gguf" in listed:  # the cache of converted models, which compares by itself
        return
    if (wrong := changed(folder, listed)) is not None:
        remedy = f"restore it or train again; to use it as it is, remove {COMPLETE}, which lists the saved files"
        raise DataError(f"{wrong}; {remedy}")


def changed(folder: Path, listed: object) -> str | None:
    """Return which saved file differs from its recorded digest; None if none does.

    Args:
        folder: The folder of the saved files.
        listed: The content of `complete.json`.

    Raises:
        ValueError: A name cannot be the name of a file.
    """
    if not (isinstance(listed, dict) and listed and all(isinstance(v, list) and len(v) == 2 for v in listed.values())):
        return f"{shown(folder / COMPLETE)} is damaged"
    for name, (size, digest) in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{shown(file)} is missing"
        if files.seal_once(file) != seals.Seal(size, digest):
            return f"{shown(file)} differs from what was saved: it was damaged or edited"
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged file to `*.damaged`, replacing an earlier file of that name.

    Args:
        path: The damaged file.
    """
    aside = path.with_name(f"{path.name}.damaged")
    files.remove(aside)
    files.move(path, aside)


def shown(path: Path | str) -> str:
    """Return a path for the terminal, with control characters escaped.

    Args:
        path: The path.
    """
    return visible(str(path))
