"""Read regular files: in a run folder only if they match their seals, and without ever waiting for a named pipe."""

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
    """Read the regular file `path`.

    Args:
        path: file to read.
        limit: the largest size accepted, in bytes; None accepts any.

    Returns:
        The content.

    Raises:
        DataError: if the file is missing, not a regular file, over `limit`, or sealed with other content.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> files.write_bytes(path, b"abc")
        >>> files.read_bytes(path)
        b'abc'

    """
    with open_file(path) as file, explained(path, "read"):
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise DataError(f"cannot read {shown(path)}: {size} bytes, at most {limit} were expected")
        data = file.read()
    seals.check_bytes(path, data)
    return data


def open_file(path: PathLike, *, buffering: int = 0) -> BinaryIO:
    """Open the regular file `path` for reading bytes. Its content is not compared with its seal: see `checked`.

    Args:
        path: file to open.
        buffering: size of the buffer in bytes, as in `open`; 0 reads without one.

    Returns:
        The open file.

    Raises:
        DataError: if the file is missing or not a regular file.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> files.write_bytes(path, b"abc")
        >>> with files.open_file(path) as file:
        ...     file.read(2)
        b'ab'

    """
    with explained(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # must not block on a named pipe
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataError(f"cannot read {shown(path)}: it is not a file; choose another path")
        return open(descriptor, "rb", buffering=buffering)


def read_json(path: PathLike, *, limit: int | None = None) -> Any:
    """Read the JSON value in the file `path`.

    Args:
        path: file to read.
        limit: the largest size accepted, in bytes; None accepts any.

    Returns:
        The value.

    Raises:
        DataError: if the file is missing, not UTF-8, not JSON, or sealed with other content.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> files.write_json(path, [1, 2])
        >>> files.read_json(path)
        [1, 2]

    """
    try:
        return json.loads(read_bytes(path, limit=limit))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)} is not valid JSON: {error}") from error


def digest(data: bytes | bytearray | memoryview) -> str:
    """Compute the digest of `data` (xxh3-128). It detects accidental changes, not forgery.

    Args:
        data: any bytes.

    Returns:
        32 hexadecimal characters.

    Example:
        >>> from datatools import files
        >>> files.digest(b"row")
        'b95419994944a4b5da0e947a60ca106d'

    """
    return xxhash.xxh3_128_hexdigest(data)


def digest_file(path: PathLike) -> str:
    """Compute the `digest` of a regular file, reading 4 MiB at a time.

    Args:
        path: file to read.

    Returns:
        32 hexadecimal characters.

    Raises:
        DataError: if the file is missing or not a regular file.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> files.write_bytes(path, b"row")
        >>> files.digest_file(path) == files.digest(b"row")
        True

    """
    return seal_of(path).digest


def seal_of(path: PathLike) -> seals.Seal:
    """Compute the size and digest of a regular file.

    Args:
        path: file to read.

    Returns:
        Its seal.

    Raises:
        DataError: if the file is missing or not a regular file.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> import tempfile
        >>> from datatools import files
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> files.write_bytes(path, b"row")
        >>> files.seal_of(path).bytes
        3

    """
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
    """Compute the seal of an open file, reading 4 MiB at a time from its first byte.

    Args:
        descriptor: file descriptor open for reading; its position does not change.

    Returns:
        Size and digest of the file.

    """
    total, size = xxhash.xxh3_128(), 0
    piece = memoryview(bytearray(4 << 20))
    while count := os.preadv(descriptor, [piece], size):
        total.update(piece[:count])
        size += count
    return seals.Seal(size, total.hexdigest())


def checked(path: PathLike) -> Path:
    """Return `path`, for libraries that open files themselves, after comparing the file with its seal if it has one.

    Args:
        path: file to check.

    Returns:
        The path.

    Raises:
        DataError: if the file has a seal that does not match its content, or is missing or not a regular file.
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    Example:
        >>> from datatools import files
        >>> files.checked("/nowhere/rows.jsonl").name
        'rows.jsonl'

    """
    if seals.expected(path):
        seals.check(path, seal_of(path))
    return Path(path)
