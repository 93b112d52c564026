"""Failures of the disk as errors of ours, always with the path and what to do."""

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
    """`error` while `doing` ("write", "read", "create") something to `path`, as one of ours with advice."""
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
    """Turn every OSError inside into one of our errors: see `explain`."""
    if "\0" in os.fspath(path):
        raise DataError(f"cannot {doing} {shown(path)}: a path holds no null byte; choose another path")
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error
