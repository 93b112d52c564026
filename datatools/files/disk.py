"""Helpers shared by writing, moving and locking: link checks, permissions, kernel locks, and fsync of folders."""

import errno
import fcntl
import os
import threading
from pathlib import Path

from datatools.errors import DataError
from datatools.files import seals
from datatools.files.problems import PathLike
from datatools.files.seals import shown

NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
"""Errors of a file system without locks."""
_umask_lock = threading.Lock()


def refuse_links(path: PathLike) -> None:
    """Refuse to write `path` if a folder between it and its run folder is a symbolic link.

    Args:
        path: file or folder about to be written.

    Raises:
        DataError: if there is such a link; the message names it.

    """
    if (link := seals.link_inside(path)) is not None:
        raise DataError(
            f"cannot write {shown(path)}: {shown(link)} is a symbolic link, which a run folder must not contain; "
            "remove the link"
        )


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`, repeating writes that the kernel completes only in part.

    Args:
        descriptor: open file descriptor.
        data: bytes to write.

    """
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Fsync `folder`, so that the names in it survive a power failure.

    Args:
        folder: existing folder.

    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders; the rename is still atomic
            raise
    finally:
        os.close(descriptor)


def umask() -> int:
    """Read the umask of this process without changing it.

    Returns:
        The permission bits that new files do not get.

    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    with _umask_lock:  # without /proc, the umask can only be read by setting it
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def flock(descriptor: int, operation: int) -> None:
    """Call `fcntl.flock`, and do nothing where the file system does not support it.

    Args:
        descriptor: open file descriptor.
        operation: `fcntl.LOCK_EX` and the like.

    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in NO_FLOCK:  # without flock, writers still work, but leftovers are not removed
            raise
