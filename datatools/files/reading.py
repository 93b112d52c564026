"""Reading regular files: in a run folder only as they were written, and never waiting for a pipe."""

import json
import os
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from datatools.errors import DataError
from datatools.files import seals
from datatools.files.problems import PathLike, explained
from datatools.files.seals import shown


def read_bytes(path: PathLike, *, limit: int | None = None) -> bytes:
    """The bytes of the regular file `path`.

    Raises: DataError if it is missing, not a file, over `limit` bytes, or in a run folder and not what the run wrote.
    """
    with explained(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not to hang on a named pipe
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"cannot read {shown(path)}: it is not a file; choose another path")
            if limit is not None and facts.st_size > limit:
                raise DataError(f"cannot read {shown(path)}: {facts.st_size} bytes, at most {limit} were expected")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read()
        finally:
            os.close(descriptor)
    seals.check_bytes(path, data)
    return data


def open_file(path: PathLike, *, buffering: int = 0) -> BinaryIO:
    """The regular file `path`, open for reading bytes; never waits for a pipe.

    Raises: DataError if it is missing or not a file. In a run folder it is not compared with its seal: see `checked`.
    """
    with explained(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataError(f"cannot read {shown(path)}: it is not a file; choose another path")
        return open(descriptor, "rb", buffering=buffering)


def read_json(path: PathLike, *, limit: int | None = None) -> Any:
    """The JSON value in `path`. Raises: DataError if it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(read_bytes(path, limit=limit))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)} is not valid JSON: {error}") from error


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of `data`, 32 hex characters. Detects accidents; it is no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_file(path: PathLike) -> str:
    """`digest` of the regular file's bytes, read in pieces of 4 MiB."""
    return seal_of(path).digest


def seal_of(path: PathLike) -> seals.Seal:
    """Size and digest of the regular file `path`. Raises: DataError if it is missing or not a file."""
    with open_file(path) as file, explained(path, "read"):
        return seal_of_open(file.fileno())


_SETTLED_NS = 2_000_000_000
"""How old a change of a file must be before its digest is kept: the coarsest clock of a file system ticks every 2 s."""

_known: dict[str, tuple[tuple[int, ...], seals.Seal]] = {}


def seal_once(path: PathLike) -> seals.Seal:
    """Return `seal_of(path)`, for large files that several steps of a process compare: each is read once.

    A file is read again when its device, inode, size or one of its times has changed, and as long as its last change
    is so recent that another one could bear the same time.

    Args:
        path: The path of a regular file.

    Returns:
        Its size and digest.

    Raises:
        DataError: It is missing or not a file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     seal_once(file.name).bytes
        0
    """
    name = os.path.abspath(path)
    with open_file(path) as file, explained(path, "read"):
        before, known = _standing(file.fileno()), _known.get(name)
        if known is not None and known[0] == before:
            return known[1]
        seal, now = seal_of_open(file.fileno()), time.time_ns()
        if before == _standing(file.fileno()) and now - max(before[-2:]) > _SETTLED_NS:
            _known[name] = before, seal
        else:
            _known.pop(name, None)
    return seal


def _standing(descriptor: int) -> tuple[int, ...]:
    facts = os.fstat(descriptor)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def seal_of_open(descriptor: int) -> seals.Seal:
    """`seal_of` of an open file, read in pieces of 4 MiB from its first byte."""
    total, size = xxhash.xxh3_128(), 0
    piece = memoryview(bytearray(4 << 20))
    while count := os.preadv(descriptor, [piece], size):
        total.update(piece[:count])
        size += count
    return seals.Seal(size, total.hexdigest())


def checked(path: PathLike) -> Path:
    """`path`, for libraries that open files themselves: in a run folder, only if it is what the run wrote.

    Raises: DataError if it is not, or is missing or not a file.
    """
    if seals.expected(path):
        seals.check(path, seal_of(path))
    return Path(path)
