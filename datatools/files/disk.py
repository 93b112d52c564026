"""What writing, moving and locking share: links, permissions, locks of the kernel, and folders on the disk for good."""

import errno
import fcntl
import os
import threading
from pathlib import Path

from datatools.errors import DataError
from datatools.files import seals
from datatools.files.problems import PathLike
from datatools.files.seals import shown

_NO_FLOCK = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}
_umask_lock = threading.Lock()


def refuse_links(path: PathLike) -> None:
    """Refuse to write `path` where a folder above it, inside a run folder, is a link. Raises: DataError."""
    if (link := seals.link_inside(path)) is not None:
        raise DataError(
            f"cannot write {shown(path)}: {shown(link)} is a symbolic link, and a run folder holds none; "
            "remove the link"
        )


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`, however often the kernel takes only a part."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk for good."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not sync folders; the rename is still atomic
            raise
    finally:
        os.close(descriptor)


def umask() -> int:
    """The permissions that this process gives nobody."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    with _umask_lock:  # elsewhere it can only be read by setting it
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def flock(descriptor: int, operation: int) -> None:
    """`fcntl.flock`, and nothing where the file system has no such locks."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_FLOCK:  # without flock writers work, and leftovers stay where they are
            raise
