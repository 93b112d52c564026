"""Create, move and remove folders and files; private folders that are removed at the end."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datatools.files import seals
from datatools.files.disk import flock, refuse_links, sync_folder
from datatools.files.problems import PathLike, explained
from datatools.files.seals import TEMPORARY, shown

_SCRATCH = "datatools-scratch-"


def make_folder(path: PathLike) -> Path:
    """Create the folder `path` and its missing parents (mode 0755 less the umask).

    Args:
        path: folder to create; it may exist.

    Returns:
        The path.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if a parent is a file, or a link inside a run folder.

    Example:
        >>> from datatools import files
        >>> path = files.make_folder(Path(tempfile.mkdtemp()) / "a" / "b")
        >>> path.is_dir()
        True

    """
    path = Path(path)
    with explained(path, "create the folder"):
        refuse_links(path / "x")
        for parent in reversed(path.parents):
            if not parent.is_dir():  # os.makedirs would give parents every permission that the umask allows
                with suppress(FileExistsError):
                    os.mkdir(parent, 0o755)
        os.makedirs(path, mode=0o755, exist_ok=True)
    return path


@contextmanager
def scratch_folder(within: PathLike | None = None) -> Iterator[Path]:
    """Provide a new private folder, which is removed at the end.

    Its parent folder is locked while the owner lives, so that folders left by killed owners are removed when the next
    one is created. The folder itself is not locked, because a run in it takes that lock.

    Args:
        within: where to create it; None is the system's folder for temporary files.

    Yields:
        The folder.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> from datatools import files
        >>> with files.scratch_folder() as folder:
        ...     folder.is_dir()
        True
        >>> folder.exists()
        False

    """
    place = Path(within if within is not None else tempfile.gettempdir())
    with explained(place, "make a temporary folder in"):
        with suppress(OSError):
            _sweep_scratch(place)
        descriptor, folder = new_locked_folder(place, _SCRATCH)
    try:
        inner = folder / "work"
        with explained(inner, "create the folder"):
            os.mkdir(inner, 0o700)
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def new_locked_folder(place: Path, prefix: str) -> tuple[int, Path]:
    """Create a private folder with a random name and lock it, so that whoever cleans up sees that its owner lives.

    Args:
        place: folder to create it in.
        prefix: how its name begins.

    Returns:
        The file descriptor that holds the lock, and the folder.

    """
    while True:
        folder = place / f"{prefix}{secrets.token_hex(8)}"
        os.mkdir(folder, 0o700)
        with suppress(FileNotFoundError):  # removed by another process before it was locked: try again
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            flock(descriptor, fcntl.LOCK_EX)
            if os.path.lexists(folder):
                return descriptor, folder
            os.close(descriptor)


def free_name(path: PathLike, *, first: int = 1, taken: Callable[[Path], bool] = os.path.lexists) -> Path:
    """Return the first of PATH-1, PATH-2, ... that does not exist: where something earlier is moved out of the way.

    Args:
        path: name without a number.
        first: number to begin with.
        taken: whether a name is in use; by default, whether it exists.

    Returns:
        The name, which is free until somebody creates it.

    Example:
        >>> from datatools import files
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "run.old-1").mkdir()
        >>> files.free_name(folder / "run.old").name
        'run.old-2'

    """
    path, number = Path(path), first
    while taken(free := path.with_name(f"{path.name}-{number}")):
        number += 1
    return free


def _sweep_scratch(place: Path) -> None:
    """Remove the scratch folders in `place` that no process has locked."""
    with os.scandir(place) as entries:
        names = [e.name for e in entries if re.fullmatch(rf"{_SCRATCH}[0-9a-f]{{16}}", e.name)]
    for name in names:
        with suppress(OSError):  # in use, owned by another user, or gone
            descriptor = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(place / name)
            finally:
                os.close(descriptor)


def move(path: PathLike, to: PathLike) -> None:
    """Rename a file or folder on the same file system, durably, and forget its seals.

    Args:
        path: file or folder to move.
        to: new name, which must not exist.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.
        DataError: if `path` is missing or `to` exists (`explained` converts the FileExistsError).

    Example:
        >>> from datatools import files
        >>> folder = Path(tempfile.mkdtemp())
        >>> files.write_bytes(folder / "a", b"")
        >>> files.move(folder / "a", folder / "b")
        >>> [file.name for file in folder.iterdir()]
        ['b']

    """
    with explained(path, f"move to {shown(to)}:"):
        if os.path.lexists(to):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(to))
        seals.drop(path)
        os.rename(path, to)
        for folder in {Path(path).parent, Path(to).parent}:
            sync_folder(folder)


def remove(path: PathLike) -> None:
    """Unlink the file `path`; no error if it does not exist.

    Args:
        path: file or symbolic link.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> from datatools import files
        >>> files.remove(Path(tempfile.mkdtemp()) / "missing")

    """
    with explained(path, "remove"), suppress(FileNotFoundError):
        os.unlink(path)


def remove_folder(path: PathLike) -> None:
    """Remove a folder, or a link in its place, all or nothing: it is renamed first. No error if it does not exist.

    Args:
        path: folder or symbolic link.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> from datatools import files
        >>> folder = files.make_folder(Path(tempfile.mkdtemp()) / "old")
        >>> files.remove_folder(folder)
        >>> folder.exists()
        False

    """
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

    Args:
        folder: folder to clean; its subfolders are not searched.

    Returns:
        The number of files and folders removed.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> from datatools import files
        >>> folder = Path(tempfile.mkdtemp())
        >>> files.write_bytes(folder / "kept", b"")
        >>> files.remove_leftovers(folder)
        0

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
            except OSError:  # renamed in the meantime, or not a temporary file of this package
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(temporary)
                else:
                    os.unlink(temporary)
                count += 1
            except OSError:  # its writer is alive, or locks are not supported: leave it
                continue
            finally:
                os.close(descriptor)
    return count
