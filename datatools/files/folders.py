"""Making, moving and removing folders and files; private folders that are gone at the end."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datatools.files import seals
from datatools.files.disk import flock, refuse_links, sync_folder
from datatools.files.problems import PathLike, explained
from datatools.files.seals import TEMPORARY, shown

_SCRATCH = "datatools-scratch-"


def make_folder(path: PathLike) -> Path:
    """Create the folder `path` and its parents where missing (0755 less the umask)."""
    path = Path(path)
    with explained(path, "create the folder"):
        refuse_links(path / "x")
        for parent in reversed(path.parents):
            if not parent.is_dir():  # os.makedirs would give it all that the umask allows
                with suppress(FileExistsError):
                    os.mkdir(parent, 0o755)
        os.makedirs(path, mode=0o755, exist_ok=True)
    return path


@contextmanager
def scratch_folder(within: PathLike | None = None) -> Iterator[Path]:
    """A fresh private folder in `within` (the system's folder for temporary files), gone at the end.

    The folder around it is locked while its owner lives, so that what killed owners left goes when the next one is
    made. The folder itself is not: a run in it locks the folder that it is in.
    """
    place = Path(within if within is not None else tempfile.gettempdir())
    with explained(place, "make a temporary folder in"):
        with suppress(OSError):
            _sweep_scratch(place)
        while True:
            folder = place / f"{_SCRATCH}{secrets.token_hex(8)}"
            os.mkdir(folder, 0o700)
            with suppress(FileNotFoundError):  # swept between the making and the lock: once more
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                flock(descriptor, fcntl.LOCK_EX)
                if os.path.lexists(folder):
                    break
                os.close(descriptor)
    try:
        inner = folder / "work"
        with explained(inner, "create the folder"):
            os.mkdir(inner, 0o700)
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _sweep_scratch(place: Path) -> None:
    """Remove the scratch folders in `place` of which nobody holds the lock."""
    with os.scandir(place) as entries:
        names = [e.name for e in entries if re.fullmatch(rf"{_SCRATCH}[0-9a-f]{{16}}", e.name)]
    for name in names:
        with suppress(OSError):  # in use, of another user, or gone
            descriptor = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(place / name)
            finally:
                os.close(descriptor)


def move(path: PathLike, to: PathLike) -> None:
    """Rename `path` (a file or a folder) to the free name `to` on the same file system, durably, without its seals."""
    with explained(path, f"move to {shown(to)}:"):
        if os.path.lexists(to):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(to))
        seals.drop(path)
        os.rename(path, to)
        for folder in {Path(path).parent, Path(to).parent}:
            sync_folder(folder)


def remove(path: PathLike) -> None:
    """Unlink the file `path`; no error if it is gone already."""
    with explained(path, "remove"), suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: PathLike) -> None:
    """Remove the folder `path`, or a link in its place, all or nothing: it is renamed first. No error if it is gone."""
    aside = Path(path).parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    with explained(path, "remove"), suppress(FileNotFoundError):
        os.rename(path, aside)
        sync_folder(aside.parent)
        if aside.is_symlink() or not aside.is_dir():
            os.unlink(aside)
        else:
            shutil.rmtree(aside)


def remove_leftovers(folder: PathLike) -> int:
    """Remove the temporary files and folders that killed writers left in `folder`; those of living writers stay.

    Returns: how many went.
    """
    count = 0
    with explained(folder, "clean"):
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(TEMPORARY)]
        for name in names:
            temporary = Path(folder) / name
            kind = os.O_RDONLY | os.O_DIRECTORY if temporary.is_dir() else os.O_RDWR
            try:
                descriptor = os.open(temporary, kind | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # renamed meanwhile, or not ours
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(temporary)
                else:
                    os.unlink(temporary)
                count += 1
            except OSError:  # its writer lives, or nobody can tell: leave it
                continue
            finally:
                os.close(descriptor)
    return count
