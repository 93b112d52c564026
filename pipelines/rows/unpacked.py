"""Compressed files, read block by block."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datatools import files

BLOCK = 1 << 20
_XZ_MEMORY = 1 << 30  # bytes that unpacking may take; files made by xz -9 take 65 MiB


def unpacked(raw: BinaryIO, how: str) -> Iterator[bytes]:
    """The content of a compressed file in blocks, none of them empty."""
    if how == ".bz2":
        yield from _members(raw, bz2.BZ2Decompressor)
    elif how == ".xz":
        yield from _members(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY))
    else:
        if how == ".gz":
            unpacked: Any = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow

            unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        while block := unpacked.read(BLOCK):
            yield block


def _members(raw: BinaryIO, start: Callable[[], Any]) -> Iterator[bytes]:
    """The content of a bzip2 or xz file, which may hold several streams, one after the other. Python's own readers take
    what cannot be read after the first stream for its end.
    """
    member, fresh = start(), True
    while block := raw.read(BLOCK):
        while block:
            if member.eof:
                block = block.lstrip(b"\0")  # xz may be padded
                if not block:
                    break
                member, fresh = start(), True
            if out := member.decompress(block, BLOCK):
                yield out
            while not member.eof and not member.needs_input:
                if out := member.decompress(b"", BLOCK):
                    yield out
            fresh = False
            block = member.unused_data if member.eof else b""
    if not member.eof and not fresh:
        raise EOFError("the file ends inside its compressed data")


def reading(path: Path) -> BinaryIO:
    """Open `path` to read its bytes.

    Raises:
        DataError: It cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise files.explain(error, path, "read") from error
