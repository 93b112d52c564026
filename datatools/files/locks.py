"""Locks of folders: they use `flock`, which the kernel releases when the holder dies, so no lock is ever stale."""

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datatools.errors import DataError, EnvironmentProblem
from datatools.files.disk import flock
from datatools.files.folders import make_folder
from datatools.files.problems import PathLike, explained
from datatools.files.seals import shown

_LOCK = ".lock"


class InUse(EnvironmentProblem):
    """Another process holds the lock of a folder.

    Example:
        >>> issubclass(InUse, EnvironmentProblem)
        True

    """


@contextmanager
def folder_mutex(folder: PathLike) -> Iterator[None]:
    """Exclude other processes that change the files of `folder` from a short block; waits, and leaves no lock file.

    Args:
        folder: existing folder.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> folder = tempfile.mkdtemp()
        >>> with files.folder_mutex(folder):
        ...     os.listdir(folder)
        []

    """
    with explained(folder, "lock the folder"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(path: PathLike, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock the folder `path` (created if missing) for one run. A second run is refused at once, or waits.

    The file `.lock` in the folder records host, process id and start time, and is removed at the end. A killed process
    leaves the file but not the lock, so the next run can take over.

    Args:
        path: folder to lock.
        waiting: None refuses when another process holds the lock; a function is called once with a description of that
            process, and the call then waits until the folder is free.

    Raises:
        InUse: if another process holds the lock and `waiting` is None; the message names the process.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> folder = tempfile.mkdtemp()
        >>> with files.lock_folder(folder):
        ...     os.listdir(folder)
        ['.lock']

    """
    folder = make_folder(path)
    file = folder / _LOCK
    with explained(file, "lock"):
        descriptor = _acquire(folder, file, waiting)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(file)  # before the lock is released, so that waiting processes see that the inode is gone
        os.close(descriptor)


def _acquire(folder: Path, file: Path, waiting: Callable[[str], None] | None) -> int:
    glances = 5  # `holder` locks the file for a moment while it looks
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(file, flags, 0o600)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"cannot lock {shown(folder)}: {_LOCK} in it is not a regular file; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(file, follow_symlinks=False)
            if current.st_nlink > 1:  # a hard link to another file, which must not be written
                os.unlink(file)
            elif current.st_ino == facts.st_ino:
                started = time.strftime("%Y-%m-%d %H:%M:%S %z")
                owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.encode(), 0)
                return descriptor
        except BlockingIOError:
            if glances:
                os.close(descriptor)
                glances -= 1
                time.sleep(0.01)
                continue
            owner = _owner(descriptor)
            os.close(descriptor)
            if waiting is not None:
                waiting(owner)
                waiting = _said
                time.sleep(0.2)
                continue
            raise InUse(
                f"{shown(folder)} is in use by {owner}; wait for that run, stop it, or choose another folder"
            ) from None
        except FileNotFoundError:  # the last holder removed it between open and stat
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def holder(path: PathLike) -> str | None:
    """Return what identifies the process that holds the lock of a folder; it never waits.

    Args:
        path: the folder.

    Returns:
        The content of the lock file (host, process id and start as JSON); None if nobody holds the lock.

    Raises:
        EnvironmentProblem: if the file system reports an error.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> folder = tempfile.mkdtemp()
        >>> with files.lock_folder(folder):
        ...     json.loads(files.holder(folder))["pid"] == os.getpid()
        True
        >>> files.holder(folder) is None
        True

    """
    file = Path(path) / _LOCK
    with explained(file, "read"):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
            return None
        except BlockingIOError:
            return os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
        finally:
            os.close(descriptor)


def _said(owner: str) -> None:
    """Ignore the holder's name: it has been reported already."""


def _owner(descriptor: int) -> str:
    for _ in range(50):  # the holder writes its name just after it acquires the lock
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.01)
    return "another process"
