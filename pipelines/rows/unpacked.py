"""Compressed files, read block by block."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datatools import files

BLOCK = 1 << 20
_XZ_MEMORY = 1 << 30  # memory limit of unpacking in bytes; files from xz -9 need 65 MiB


def unpacked(raw: BinaryIO, how: str) -> Iterator[bytes]:
    """Yield the content of a compressed file in blocks, none of them empty.

    Args:
        raw: The file, at its beginning.
        how: The compression, one of `input_files.PACKED`.
    """
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
    """Yield the content of a bzip2 or xz file, which may contain several streams.

    Python's own readers ignore everything after the first stream that they cannot read.
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
    """Open a file to read its bytes.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise files.explain(error, path, "read") from error
