"""Seals: which bytes a run wrote, so that a later step believes no others.

A folder that holds `seals.jsonl` is sealed: whenever `datatools.files` puts a file into it (or into a folder inside),
it first appends a line with the file's name, size and digest, and it refuses to read a file that differs. The line is
on the disk before the file has its name, so after a kill a file holds what its last line says or what the one before
says; both are accepted. A line that a kill cut short has no newline and counts as not written. Lines carry a checksum
of their own. Files without a line (logs, caches, feature stores, what the user added) are no business of the seals:
they have their own checks or are not believed.

Digests are xxh3-128, as everywhere here: they detect accidents and edits by hand, not forgery; whoever can write the
folder can write the seals too.
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
    "; without it nobody can tell whether the files of the run are what it wrote: restore it, start anew with "
    "--overwrite, or take the files as they are with --accept-change seals"
)


class Seal(NamedTuple):
    """Size in bytes and xxh3-128 of a file's content."""

    bytes: int
    digest: str


class _Read(NamedTuple):
    """What was read of a file of seals: up to which byte, how many lines, the last one, and all by file name."""

    end: int
    lines: int
    last: bytes
    seals: dict[str, list[Seal]]


_read: dict[str, _Read] = {}


def root_of(path: PathLike) -> str | None:
    """The sealed folder that `path` is in, or None. Links are not resolved: a name belongs to the folder it is under.

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
    """The first symbolic link among the folders between the sealed folder of `path` and its last part, or None."""
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
    """Append the line for the file that is about to be put at `path`; nothing where no sealed folder is above it.

    Raises: OSError when the disk refuses; the file must then not be put there.
    """
    root = root_of(path)
    if root is None:
        return
    name = os.path.relpath(os.path.abspath(path), root)
    if name != NAME and not any(part.startswith(TEMPORARY) for part in name.split(os.sep)):
        _append(root, _line({"name": name, "bytes": seal.bytes, "xxh3": seal.digest}))


def drop(path: PathLike) -> None:
    """Forget the seals of the file or folder `path`, which is about to be moved away: its name is free again."""
    root = root_of(path)
    if root is None:
        return
    name = os.path.relpath(os.path.abspath(path), root)
    gone = [held for held in seals_of(root) if held == name or held.startswith(name + os.sep)]
    if gone:
        _append(root, b"".join(_line({"name": held, "bytes": 0, "xxh3": None}) for held in gone))


def _append(root: str, lines: bytes) -> None:
    with locked(root) as descriptor:
        if descriptor is None:  # the folder was moved away meanwhile
            return
        end = _whole_lines(descriptor)
        os.ftruncate(descriptor, end)  # what a kill or a full disk cut short
        rest = memoryview(lines)
        while rest:
            count = os.pwrite(descriptor, rest, end)
            rest, end = rest[count:], end + count
        os.fsync(descriptor)


def seals_of(root: PathLike) -> dict[str, list[Seal]]:
    """File name -> its last seals, at most two, the newest last. Raises: DataError for damaged seals."""
    path = _path(root)
    known = _read.get(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    except OSError as error:
        raise DataError(f"{shown(os.path.join(root, NAME))} cannot be read ({error.strerror}){REMEDY}") from error
    with open(descriptor, "rb") as file:
        if known is None or os.pread(descriptor, len(known.last), known.end - len(known.last)) != known.last:
            known = _Read(0, 0, b"", {})  # another file than the one that was read
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
    """Read the seals of `root` from their first byte the next time."""
    _read.pop(_path(root), None)


def check(path: PathLike, seal: Seal) -> None:
    """Refuse a file whose content is not what was written. Raises: DataError that says what to do."""
    known = expected(path)
    if known and seal not in known:
        raise DataError(refusal(path))


def check_bytes(path: PathLike, data: bytes | bytearray | memoryview) -> None:
    """`check` of a file that was read whole; costs nothing outside sealed folders."""
    known = expected(path)
    if known and Seal(len(data), xxhash.xxh3_128_hexdigest(data)) not in known:
        raise DataError(refusal(path))


def expected(path: PathLike) -> list[Seal]:
    """The seals of the file `path`; empty where it has none."""
    root = root_of(path)
    if root is None:
        return []
    name = os.path.relpath(os.path.abspath(path), root)
    return [] if name == NAME else seals_of(root).get(name, [])


def refusal(path: PathLike) -> str:
    """What to say of a file that is not what was written."""
    if os.path.basename(path) == "run.yaml":
        return (
            f"{shown(path)} is not what the run wrote: it was damaged or edited. It is the record of what ran; to "
            "run with other settings, copy it out of the folder and give the copy another --out, or use --set; "
            "otherwise restore it"
        )
    return (
        f"{shown(path)} is not what the run wrote: it was damaged or edited. Restore it, or run the command that "
        "made it again; to use an edited file, copy it out of the run folder"
    )


def text(entries: Mapping[str, Iterable[Seal]]) -> bytes:
    """The content of a file of seals with these entries."""
    lines = [_line({"format": FORMAT})]
    for name, seals in sorted(entries.items()):
        lines += [_line({"name": name, "bytes": seal.bytes, "xxh3": seal.digest}) for seal in seals]
    return b"".join(lines)


@contextmanager
def locked(root: PathLike) -> Iterator[int | None]:
    """The seals of `root`, open for reading and writing and locked against other writers; None if there are none.

    Whoever replaces the file does it inside; others then open the new one.
    """
    path = _path(root)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | _OPEN)
        except FileNotFoundError:
            yield None
            return
        with suppress(OSError):  # a file system without flock: then one process at a time must do
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
    """Where the last line ends that has its newline."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def shown(path: PathLike) -> str:
    """The path with control characters escaped: a file name must not be able to write to the terminal."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
