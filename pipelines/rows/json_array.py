"""A file with one JSON array of rows, read row by row."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from datatools import DataError
from pipelines.rows.jsonl import Limits, Malformed, shown
from pipelines.rows.unpacked import BLOCK, reading

# the tokens of a JSON text that determine where an element of an array ends
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]|[^"\[\]{},]++', re.DOTALL)


def is_array(path: Path) -> bool:
    """Return whether a file begins like a JSON array.

    Args:
        path: The file.
    """
    with reading(path) as file:
        head = file.read(4096)
        return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def rows_of_array(file: BinaryIO, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """Yield the bytes of each element of a JSON array, on one line. Elements are scanned only for their brackets.

    A file with an array of rows is like lines with commas between them. Faults inside an element are found by the
    reader of lines, which reports its number.

    Args:
        file: The file, at its beginning.
        name: The name of the file, for messages.
        limits: The limits of one row.

    Raises:
        DataError: A string is longer than a line may be.
    """
    buffer = file.read(BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    at = start = 1  # after the "["
    depth, too_long, more = 0, False, True
    while True:
        match = _TOKEN.match(buffer, at)
        if match is None or (match.end() == len(buffer) and more):  # the token may continue
            if more:
                if len(buffer) - at > limits.line_bytes + BLOCK:
                    raise DataError(
                        f"{name}: a string is longer than {limits.line_bytes} bytes (limit line_bytes); a "
                        "quotation mark may be missing; write the rows as JSONL, one per line"
                    )
                if at - start > limits.line_bytes:
                    too_long, start = True, at
                block = file.read(BLOCK)
                more = bool(block)
                buffer = buffer[start:] + block
                at, start = at - start, 0
                continue
            rest = buffer[start:].strip()
            yield Malformed("truncated_json", "the file ends inside the array" + (", in this row" if rest else ""))
            return
        at = match.end()
        token = match.group()
        ends = token == b"]"
        if depth == 0 and (token == b"," or ends):
            element = buffer[start : at - 1].strip()
            if b"\n" in element:
                if any(b"\n" in string.group() for string in _STRING.finditer(element)):
                    element = b'"'  # a raw line end inside a string: the reader of lines refuses it
                element = element.replace(b"\n", b" ")
            if too_long or len(element) > limits.line_bytes:
                yield Malformed("line_too_long", f"more than {limits.line_bytes} bytes (limit line_bytes)")
            elif element or token == b",":
                yield element or Malformed("invalid_json", "no value between two commas")
            start, too_long = at, False
            if ends:
                if (rest := buffer[at:].strip()) or (rest := file.read(BLOCK).strip()):
                    yield Malformed("extra_data", f"after the end of the array: {shown(rest[:30].decode('latin-1'))}")
                return
        elif token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            depth = max(0, depth - 1)
