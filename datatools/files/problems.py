"""Convert errors of the operating system into datatools errors, always with the path and a remedy."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from datatools.errors import DataError, DatatoolsError, EnvironmentProblem
from datatools.files.seals import shown

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


PathLike = str | os.PathLike[str]


def explain(error: OSError, path: PathLike, doing: str) -> DatatoolsError:
    """Convert an OSError into a datatools error with advice.

    Args:
        error: what the operating system raised.
        path: file or folder that was accessed.
        doing: what was attempted: "write", "read", "create", ...

    Returns:
        `DataError` if the path is at fault, else `EnvironmentProblem`; it is not raised.

    Example:
        >>> print(explain(FileNotFoundError(errno.ENOENT, "No such file"), "rows.jsonl", "read"))
        cannot read rows.jsonl: No such file; check the path

    """
    what = error.strerror or str(error)
    head = f"cannot {doing} {shown(path)}: {what}"
    if error.errno in NO_SPACE:
        return EnvironmentProblem(
            f"{head}; free some space (or raise the quota) and run the same command again, finished parts are kept"
        )
    if error.errno in _FORBIDDEN:
        return EnvironmentProblem(f"{head}; check the permissions, or choose another folder")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return EnvironmentProblem(f"{head}; raise the limit on open files (ulimit -n)")
    if error.errno == errno.ENOENT:
        return DataError(f"{head}; check the path")
    if error.errno in {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST}:
        return DataError(f"{head}; choose another path")
    return EnvironmentProblem(f"{head}; check the disk and run the same command again, finished parts are kept")


@contextmanager
def explained(path: PathLike, doing: str) -> Iterator[None]:
    """Convert every OSError raised in the block with `explain`.

    Args:
        path: file or folder that the block accesses.
        doing: what the block attempts: "write", "read", "create", ...

    Raises:
        EnvironmentProblem: if the machine is at fault.
        DataError: if the path is at fault, for example if it contains a null byte.

    """
    if "\0" in os.fspath(path):
        raise DataError(f"cannot {doing} {shown(path)}: the path contains a null byte; choose another path")
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error
