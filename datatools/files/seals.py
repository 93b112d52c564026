"""Seals: records of the bytes that a run wrote, so that later steps reject any others.

A folder that contains `seals.jsonl` is sealed. Before `datatools.files` puts a file into it (or into one of its
subfolders), it appends a line with the file's name, size and digest; it refuses to read a file that differs. The line
is on the disk before the file gets its name, so after a kill a file matches its last line or the line before; both are
accepted. A line that a kill cut short has no newline and is ignored. Lines carry a checksum of their own. Files without
a line (logs, caches, feature stores, files that the user added) are not covered by seals: they have checks of their
own, or nothing relies on them.

Digests are xxh3-128, as everywhere in this package: they detect accidents and edits by hand, not forgery, because
anybody who can write to the folder can write the seals too.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import xxhash

from datatools.errors import DataError

NAME = "seals.jsonl"
FORMAT = 1
TEMPORARY = ".tmp-"
_DEPTH = 8  # folders between a file and the seals above it
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

PathLike = str | os.PathLike[str]
REMEDY = (
    "; without it, the files of the run cannot be verified: restore it, start again with --overwrite, or accept the "
    "files as they are with --accept-change seals"
)


class Seal(NamedTuple):
    """Size and digest of a file's content.

    Attributes:
        bytes: size in bytes.
        digest: xxh3-128, 32 hexadecimal characters.

    """

    bytes: int
    digest: str


class _Read(NamedTuple):
    """How far a file of seals has been read: bytes, lines, the last line, and the seals by file name."""

    end: int
    lines: int
    last: bytes
    seals: dict[str, list[Seal]]


_read: dict[str, _Read] = {}


def root_of(path: PathLike) -> str | None:
    """Find the sealed folder that contains `path`.

    Links are not resolved: a name belongs to the folder under which it is written.

    Args:
        path: file or folder; it need not exist.

    Returns:
        The absolute path of the closest sealed folder, or None.

    Example:
        >>> root_of("/nowhere/file.json") is None
        True

    """
    parent = os.path.dirname(os.path.abspath(path))
    for _ in range(_DEPTH):
        if os.path.lexists(os.path.join(parent, NAME)):
            return parent
        above = os.path.dirname(parent)
        if above == parent:
            break
        parent = above
    return None


def link_inside(path: PathLike) -> str | None:
    """Find a symbolic link among the folders between the sealed folder of `path` and `path` itself.

    Args:
        path: file or folder; it need not exist.

    Returns:
        The path of the first link, or None.

    """
    root = root_of(path)
    if root is None:
        return None
    here = root
    for part in os.path.relpath(os.path.abspath(path), root).split(os.sep)[:-1]:
        here = os.path.join(here, part)
        if os.path.islink(here):
            return here
    return None


def record(path: PathLike, seal: Seal) -> None:
    """Append the line for a file that is about to be put at `path`; do nothing outside sealed folders.

    Args:
        path: final name of the file.
        seal: its size and digest.

    Raises:
        OSError: if the line cannot be written; the file must then not be put there.

    """
    root = root_of(path)
    if root is None:
        return
    name = os.path.relpath(os.path.abspath(path), root)
    # the first seals of a run inside this folder are written while it is not sealed itself; they grow with that run
    if os.path.basename(name) != NAME and not any(part.startswith(TEMPORARY) for part in name.split(os.sep)):
        _append(root, _line({"name": name, "bytes": seal.bytes, "xxh3": seal.digest}))


def drop(path: PathLike) -> None:
    """Forget the seals of a file or folder that is about to be moved away, so that its name can be used again.

    Args:
        path: file or folder.

    """
    root = root_of(path)
    if root is None:
        return
    name = os.path.relpath(os.path.abspath(path), root)
    gone = [held for held in seals_of(root) if held == name or held.startswith(name + os.sep)]
    if gone:
        _append(root, b"".join(_line({"name": held, "bytes": 0, "xxh3": None}) for held in gone))


def _append(root: str, lines: bytes) -> None:
    with locked(root) as descriptor:
        if descriptor is None:  # the folder has been moved away
            return
        end = _whole_lines(descriptor)
        os.ftruncate(descriptor, end)  # drops a line that a kill or a full disk cut short
        rest = memoryview(lines)
        while rest:
            count = os.pwrite(descriptor, rest, end)
            rest, end = rest[count:], end + count
        os.fsync(descriptor)


def seals_of(root: PathLike) -> dict[str, list[Seal]]:
    """Read the seals of a sealed folder.

    Args:
        root: the sealed folder.

    Returns:
        File name, relative to `root` -> its last seals, at most two, the newest last.

    Raises:
        DataError: if the file of seals is missing, empty or damaged.

    """
    path = _path(root)
    known = _read.get(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    except OSError as error:
        raise DataError(f"{shown(os.path.join(root, NAME))} cannot be read ({error.strerror}){REMEDY}") from error
    with open(descriptor, "rb") as file:
        if known is None or os.pread(descriptor, len(known.last), known.end - len(known.last)) != known.last:
            known = _Read(0, 0, b"", {})  # the file has been replaced since it was read
        file.seek(known.end)
        fresh = file.read()
    end, number, last = known.end, known.lines, known.last
    for line in fresh.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        number += 1
        _parse(line, number, path, known.seals)
        end, last = end + len(line), line
    if not number:
        raise DataError(f"{shown(path)} is empty{REMEDY}")
    _read[path] = _Read(end, number, last, known.seals)
    return known.seals


def forget(root: PathLike) -> None:
    """Discard what was read of the seals of `root`, so that the next call reads them from the first byte.

    Args:
        root: a sealed folder.

    """
    _read.pop(_path(root), None)


def check(path: PathLike, seal: Seal) -> None:
    """Refuse a file whose content differs from its seal; accept files without one.

    Args:
        path: the file.
        seal: its actual size and digest.

    Raises:
        DataError: if they differ; the message gives the remedy.

    """
    known = expected(path)
    if known and seal not in known:
        raise DataError(refusal(path))


def check_bytes(path: PathLike, data: bytes | bytearray | memoryview) -> None:
    """Apply `check` to a file whose content is in memory; costs nothing outside sealed folders.

    Args:
        path: the file.
        data: its content.

    Raises:
        DataError: if the content differs from the seal.

    """
    known = expected(path)
    if known and Seal(len(data), xxhash.xxh3_128_hexdigest(data)) not in known:
        raise DataError(refusal(path))


def expected(path: PathLike) -> list[Seal]:
    """Look up the seals of a file.

    Args:
        path: the file.

    Returns:
        Its last seals, at most two; empty if it has none.

    Raises:
        DataError: if the file of seals is damaged.

    """
    root = root_of(path)
    if root is None:
        return []
    name = os.path.relpath(os.path.abspath(path), root)
    return [] if name == NAME else seals_of(root).get(name, [])


def refusal(path: PathLike) -> str:
    """Compose the message for a file that differs from its seal.

    Args:
        path: the file.

    Returns:
        What is wrong and what to do.

    """
    if os.path.basename(path) == "run.yaml":
        return (
            f"{shown(path)} is not what the run wrote: it was damaged or edited. It records the settings of the run; "
            "to run with other settings, copy it out of the folder and give the copy another --out, or use --set; "
            "otherwise restore it"
        )
    return (
        f"{shown(path)} is not what the run wrote: it was damaged or edited. Restore it, or run the command that "
        "made it again; to use an edited file, copy it out of the run folder"
    )


def text(entries: Mapping[str, Iterable[Seal]]) -> bytes:
    """Compose the content of a file of seals.

    Args:
        entries: file name -> its seals, the newest last.

    Returns:
        The lines, UTF-8.

    """
    lines = [_line({"format": FORMAT})]
    for name, seals in sorted(entries.items()):
        lines += [_line({"name": name, "bytes": seal.bytes, "xxh3": seal.digest}) for seal in seals]
    return b"".join(lines)


@contextmanager
def locked(root: PathLike) -> Iterator[int | None]:
    """Open the seals of `root` for reading and writing, locked against other writers.

    A process that replaces the file does so inside this block; other processes then open the new one.

    Args:
        root: a sealed folder.

    Yields:
        The file descriptor, or None if `root` has no seals.

    """
    path = _path(root)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | _OPEN)
        except FileNotFoundError:
            yield None
            return
        with suppress(OSError):  # without flock, the caller must ensure that only one process writes
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.stat(path, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _path(root: PathLike) -> str:
    return os.path.join(os.path.abspath(root), NAME)


def _line(body: Mapping[str, object]) -> bytes:
    text = json.dumps(body)
    return json.dumps({**body, "sum": xxhash.xxh3_64_hexdigest(text.encode())}).encode() + b"\n"


def _parse(line: bytes, number: int, path: str, seals: dict[str, list[Seal]]) -> None:
    try:
        body = json.loads(line)
        body.pop("sum")  # which `_line` computes again
        if _line(body) != line:
            raise ValueError
        if number == 1:
            if body["format"] == FORMAT:
                return
        elif body["xxh3"] is None:
            seals.pop(body["name"], None)
            return
        elif os.path.basename(body["name"]) == NAME:  # of a run inside this folder, recorded by an earlier version
            return
        else:
            entries = seals.setdefault(body["name"], [])
            entries.append(Seal(body["bytes"], body["xxh3"]))
            del entries[:-2]
            return
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        _read.pop(path, None)
        raise DataError(f"{shown(path)}, line {number}: damaged{REMEDY}") from None
    raise DataError(
        f"{shown(path)} has format {body['format']}, this version reads {FORMAT}; use the version that wrote it"
    )


def _whole_lines(descriptor: int) -> int:
    """Return the offset of the end of the last complete line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def shown(path: PathLike) -> str:
    """Escape control characters in a path, because a file name must not control the terminal.

    Args:
        path: the path.

    Returns:
        The path as printable text.

    """
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
