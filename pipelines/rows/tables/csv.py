"""CSV files with a header as lines of JSON."""

import csv
import sys
from collections.abc import Iterator
from typing import BinaryIO

from datatools import DataError
from pipelines.rows.jsonl import Limits, Malformed, shown
from pipelines.rows.tables.values import as_json

_REWINDS = 16  # how many endless records may be read again from their second line


def rows_of_csv(file: BinaryIO, delimiter: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """Yield the rows of a CSV file with a header as lines of JSON. Memory is limited to one record.

    A record that is longer than `limits.line_bytes`, for example because a quotation mark is missing, is a bad row,
    and reading continues after its first line.

    Args:
        file: The file, at its beginning.
        delimiter: The character between two fields.
        limits: The limits of one row.

    Raises:
        DataError: The header cannot be read.
    """
    csv.field_size_limit(min(max(csv.field_size_limit(), limits.line_bytes), sys.maxsize))  # one limit for the process
    lines = _Lines(file, limits.line_bytes)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines.start_record()
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, Malformed) as error:
            if header is None:
                raise DataError(f"the header of the table cannot be read: {error}") from error
            if isinstance(error, Malformed) or "field limit" in str(error):
                first, last = lines.give_up()
                rows = csv.reader(lines, delimiter=delimiter, strict=True)
                yield Malformed(
                    "line_too_long",
                    f"the record that begins in line {first} of the file has not ended "
                    f"after {limits.line_bytes} bytes (limit line_bytes), in line {last}; a quotation "
                    "mark may be missing",
                )
            else:
                yield Malformed("invalid_csv", f"{error}, near line {lines.number} of the file")
            continue
        if header is None:
            if len(set(row)) != len(row) or not row:
                raise DataError(f"the header of the table is empty or names a column twice: {shown(str(row), 120)}")
            header = row
        elif row and len(row) != len(header):
            yield Malformed(
                "invalid_csv",
                f"{len(row)} fields where the header has {len(header)}, near line {lines.number} of the file",
            )
        elif row:
            yield as_json(dict(zip(header, row, strict=True)))


class _Lines:
    """The lines of a CSV file as text; no line and no record is longer than `limit` bytes."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._buffer, self._at = b"", 0  # a line of the file, and where the next one begins in it
        self._offset = 0  # its offset in the file
        self._rewinds = 0
        self._of_record = 0  # bytes that the record has so far
        self._first = (0, 0)  # number of the record's first line, and the offset after it
        self.number = 0
        """The number of the last line that was read."""

    def __iter__(self) -> Iterator[str]:
        return self

    def start_record(self) -> None:
        """Begin a record with the next line."""
        self._of_record = 0

    def __next__(self) -> str:
        line = self._line()
        if not line:
            raise StopIteration
        self.number += 1
        if not self._of_record:
            self._first = (self.number, self._offset)
        self._of_record += len(line)
        if self._of_record > self._limit:
            raise Malformed("line_too_long", f"more than {self._limit} bytes in a record")
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        return line.decode("utf-8", "surrogateescape")

    def _line(self) -> bytes:
        if self._at == len(self._buffer):
            self._buffer, self._at = self._file.readline(self._limit + 2), 0
        end = self._buffer.find(b"\r", self._at) + 1  # a lone carriage return also ends a line
        if end and self._buffer[end : end + 1] == b"\n":
            end += 1
        line = self._buffer[self._at : end or len(self._buffer)]
        self._at += len(line)
        self._offset += len(line)
        return line

    def give_up(self) -> tuple[int, int]:
        """Continue after the first line of the record, a few times, otherwise after its last. Returns both numbers."""
        (first, place), last = self._first, self.number
        if first < last and self._rewinds < _REWINDS:
            self._rewinds += 1
            self.number, self._offset = first, place
            self._buffer, self._at = b"", 0
            self._file.seek(place)
        else:  # the rest of the line
            while self._buffer and not self._buffer.endswith((b"\n", b"\r")) and self._at == len(self._buffer):
                self._line()
        return first, last
