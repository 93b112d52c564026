"""Leases of units of work: which of several processes computes which unit, agreed on through one file.

A lease is a lock on one byte of the file, the byte with the number of the unit. The kernel releases the locks of a
process that dies, and a file server those of a machine that dies, so that no lease has to expire and clocks do not
matter. Where a file system has no locks, every lease is granted: units are then computed more than once, which costs
time and changes nothing, because units are committed whole.
"""

import fcntl
import os
from pathlib import Path
from typing import Self

from datatools.files.disk import NO_FLOCK, refuse_links
from datatools.files.problems import PathLike, explained


class Leases:
    """The leases of one job, in a file that all its workers open.

    The locks belong to the process: threads of one process do not exclude each other, and a process that opens and
    closes the file a second time loses its leases.

    Args:
        path: the file, which never has content.
        create: whether to create it if it is missing.

    Raises:
        EnvironmentProblem: if the file cannot be opened.
        DataError: if the file is missing and `create` is false.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> with files.Leases(Path(tempfile.mkdtemp()) / ".leases") as leases:
        ...     leases.take(7)
        True

    """

    def __init__(self, path: PathLike, *, create: bool = True) -> None:
        self._path = Path(path)
        with explained(path, "open"):
            refuse_links(path)
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(path, flags | (os.O_CREAT if create else 0), 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)  # which releases all leases

    def take(self, unit: int) -> bool:
        """Take the lease of a unit, unless another process has it.

        Args:
            unit: number of the unit.

        Returns:
            Whether this process has it now.

        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_FLOCK:
                with explained(self._path, "lock"):
                    raise
        return True

    def give_back(self, unit: int) -> None:
        """Release the lease of a unit.

        Args:
            unit: number of the unit.

        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, unit)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                with explained(self._path, "lock"):
                    raise
