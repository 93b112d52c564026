"""Input files cut into byte ranges that end with a line: what one worker indexes at a time.

The cuts depend on the bytes of a file alone, so that the parts of an index are the same whoever makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from datatools import files

BYTES = 4 << 20
"""A new range begins with the first line that starts this many bytes after the last one, or later."""
_CHUNK = 1 << 20


class Range(NamedTuple):
    """Whole lines of one file.

    Attributes:
        file: The number of the input file.
        start: The offset of the first byte.
        end: The offset after the last byte.
        line: The number of the first line, counted from 1.
        lines: The number of lines.
        digest: The xxh3-64 of the bytes.
    """

    file: int
    start: int
    end: int
    line: int
    lines: int
    digest: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The ranges of one file, and what was seen of it on the way."""

    ranges: tuple[Range, ...]
    bytes: int
    digest: str
    """The xxh3-128 of all bytes."""


def cut(path: Path, file: int = 0, size: int | None = None) -> Cut:
    """Cut a file into ranges of whole lines.

    Args:
        path: The file.
        file: Its number.
        size: The least number of bytes between the beginnings of two ranges; by default `BYTES`.

    Raises:
        DataError: The file cannot be read.

    Cost:
        One pass over the bytes, at the speed of a digest.
    """
    size = BYTES if size is None else size
    whole, part = xxhash.xxh3_128(), xxhash.xxh3_64()
    found: list[Range] = []
    start = at = lines = before = 0  # the start of the open range; bytes and newlines so far; newlines at the start
    ended = True
    with files.open_file(path, buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
            place = 0
            while (end := chunk.find(b"\n", max(place, start + size - 1 - at))) >= 0:
                part.update(chunk[place : end + 1])
                lines += chunk.count(b"\n", place, end + 1)
                found.append(Range(file, start, at + end + 1, before + 1, lines - before, part.intdigest()))
                start, before, place = at + end + 1, lines, end + 1
                part.reset()
            part.update(chunk[place:])
            lines += chunk.count(b"\n", place)
            at += len(chunk)
            ended = chunk.endswith(b"\n")
    if at > start or not found:
        found.append(Range(file, start, at, before + 1, lines - before + (not ended), part.intdigest()))
    return Cut(tuple(found), at, whole.hexdigest())
