"""What a run folder may hold, and whether its files still are what the run wrote; see `datatools.files.seals`."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from datatools import DataError, files
from datatools.files import seals
from pipelines.texts import visible

OPEN = {seals.NAME, "progress.json", "events.jsonl", ".lock"}
"""Files of a run folder that are not sealed: they are replaced all the time, or carry checksums of their own."""
RECORDS = {"run.yaml", "provenance.json", "warmup/rows.json"}
"""What nothing could compute again: what ran, and on which rows of the pool as it was then."""
COMPLETE = "complete.json"
"""Lists its folder's files with their digests, which are compared when they are used: not twice."""
SEALED_SINCE = 2
"""The format of provenance.json since which there are seals."""


def sweep(folder: Path) -> None:
    """Remove what killed writers left anywhere in `folder`. Raises: DataError, as `refuse_special`."""
    refuse_special(folder)
    for parent, folders, _ in os.walk(folder):
        files.remove_leftovers(parent)
        folders[:] = [name for name in folders if not name.startswith(seals.TEMPORARY)]


def refuse_special(folder: Path) -> None:
    """Refuse a run folder that holds a link, a pipe or a device; the folder itself may be a link.

    Raises: DataError naming it: nothing of a run is one, libraries write through them, and they may lead anywhere.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            child = Path(parent, name)
            with suppress(FileNotFoundError):  # of a writer that is at work
                if (kind := _special(child.lstat().st_mode)) is not None:
                    raise DataError(
                        f"{shown(child)} is {kind}; a run folder holds files and folders only, so nothing is written "
                        "there: remove it, or choose another --out"
                    )


def _special(mode: int) -> str | None:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def begin(folder: Path) -> None:
    """Seal the folder of a new run, before its first file."""
    files.write_bytes(folder / seals.NAME, seals.text({}))
    seals.forget(folder)


def adopt(folder: Path) -> None:
    """Seal the files that lie in `folder` as they are."""
    found = {str(path.relative_to(folder)): [files.seal_of(path)] for path in _believed(folder)}
    files.write_bytes(folder / seals.NAME, seals.text(found))
    seals.forget(folder)


def _believed(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        if "plan.json" in names:  # a feature store, which has its own digests
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(seals.TEMPORARY) and name != "inputs")
        for name in sorted(names):
            if name not in OPEN and not name.startswith(seals.TEMPORARY):
                yield Path(parent, name)


def is_sealed(folder: Path) -> bool:
    """Whether `folder` has seals; False for that of an older version.

    Raises: DataError where the run wrote seals and they are gone.
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
    """What a reader of the run in `folder` must be told, or None. Raises: DataError as `is_sealed`."""
    if not (folder / "run.yaml").is_file() or is_sealed(folder):
        return None
    return f"{shown(folder)} was written by a version without seals: nothing shows whether its files were changed"


def damaged(folder: Path) -> list[str]:
    """Names of the files in `folder` that are there and not what their seals say; shortens the file of seals.

    Raises: DataError for damaged seals.
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
    """Compare an adapter or a model that `datatools train` saved with the digests beside it; others have none.

    Raises: DataError naming the file that was damaged, edited or lost.
    """
    path = folder / COMPLETE
    if not path.is_file():
        return
    listed = files.read_json(path)
    if isinstance(listed, dict) and "gguf" in listed:  # the cache of converted models, which compares by itself
        return
    if (wrong := changed(folder, listed)) is not None:
        remedy = f"restore it or train again; to use it as it is, remove {COMPLETE}, which lists what was saved"
        raise DataError(f"{wrong}; {remedy}")


def changed(folder: Path, listed: object) -> str | None:
    """Which of the saved files in `folder` is not what `listed`, the content of `complete.json`, says; None if all are.

    Raises: ValueError for names that no file can have.
    """
    if not (isinstance(listed, dict) and listed and all(isinstance(v, list) and len(v) == 2 for v in listed.values())):
        return f"{shown(folder / COMPLETE)} is damaged"
    for name, (size, digest) in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{shown(file)} is missing"
        if files.seal_once(file) != seals.Seal(size, digest):
            return f"{shown(file)} is not what was saved: it was damaged or edited"
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged file to `*.damaged`, where the last one of them stays."""
    aside = path.with_name(f"{path.name}.damaged")
    files.remove(aside)
    files.move(path, aside)


def shown(path: Path | str) -> str:
    """The path as it may go to the terminal: control characters are escaped."""
    return visible(str(path))
