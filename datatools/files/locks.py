"""Locks of folders: `flock`, which the kernel drops when its holder dies, so no lock is ever stale."""

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


@contextmanager
def folder_mutex(folder: PathLike) -> Iterator[None]:
    """A short critical section among the processes that change files of `folder` together; waits, leaves no file."""
    with explained(folder, "lock the folder"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(path: PathLike, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the folder `path` (created if missing) for one run; a second holder is refused at once, or waits.

    waiting: called once with the holder's name when there is one; then this waits until the folder is free.

    The file `.lock` inside names host, pid and start time and is gone afterwards. A killed holder leaves the file but
    not the lock, so the next run takes over.
    Raises: EnvironmentProblem that names the holder.
    """
    folder = make_folder(path)
    file = folder / _LOCK
    with explained(file, "lock"):
        descriptor = _acquire(folder, file, waiting)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(file)  # before the lock goes: whoever waits on this inode sees that it is gone
        os.close(descriptor)


def _acquire(folder: Path, file: Path, waiting: Callable[[str], None] | None) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(file, flags, 0o600)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"cannot lock {shown(folder)}: {_LOCK} in it is not a file; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(file, follow_symlinks=False)
            if current.st_nlink > 1:  # a second name of another file, which is not ours to write
                os.unlink(file)
            elif current.st_ino == facts.st_ino:
                started = time.strftime("%Y-%m-%d %H:%M:%S %z")
                owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.encode(), 0)
                return descriptor
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            if waiting is not None:
                waiting(owner)
                waiting = _said
                time.sleep(0.2)
                continue
            raise EnvironmentProblem(
                f"{shown(folder)} is in use by {owner}; wait for that run, stop it, or choose another folder"
            ) from None
        except FileNotFoundError:  # the last holder removed it between open and stat
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _said(owner: str) -> None:
    """Who holds the folder was said already."""


def _owner(descriptor: int) -> str:
    for _ in range(50):  # the holder writes its name right after it has the lock
        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.01)
    return "another process"
