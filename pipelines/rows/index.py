"""The usable rows of all inputs: columns in memory, texts on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from datatools import DataError, files
from pipelines.rows.formats.record import Given
from pipelines.rows.gather import Columns
from pipelines.rows.jsonl import parse_object
from pipelines.rows.options import Options, subtask_of
from pipelines.rows.part import Input
from pipelines.rows.row import BadRow, Row


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One input file.

    Attributes:
        path: The name of the file.
        bytes: The size.
        digest: The xxh3-128 of its bytes.
        rows: The number of usable rows.
        bad: The number of bad rows.
        blank: The number of blank lines.
    """

    path: str
    bytes: int
    digest: str
    rows: int
    bad: int = 0
    blank: int = 0


class Pool:
    """The usable rows of all inputs, in order. Texts stay on disk; memory is about 40 bytes per row, plus its id.

    `pool[i]` reads and parses row i again.

    Args:
        options: How rows are read.
        inputs: The input files.
        columns: The columns of their parts.

    Raises:
        DataError: On reading a row: the file has changed since it was indexed.
    """

    def __init__(self, options: Options, inputs: Sequence[Input], columns: Columns) -> None:
        self.files: list[FileInfo] = []
        """What is known of each input file."""
        self.flags = columns.flags
        """The number of rows with each flag: `Shape.flags`, and new_id, repeated_id, source_from_file."""
        self.lines: NDArray[np.int64] = columns.numbers("line")
        """The line of each row."""
        self.sources = columns.sources()
        """The source of each row."""
        self.names = columns.files()
        """The input that contains each row, as it was named."""
        self.ids = columns.ids()
        """The id of each row."""
        self._options, self._inputs = options, list(inputs)
        self._offset, self._length = columns.numbers("offset"), columns.numbers("length")
        self._digest = columns.numbers("digest")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a pool of {len(self)} rows")
        index %= len(self)
        raw = self.raw(index)
        value = parse_object(raw, self._options.limits)
        columns = self._inputs[self.names.codes[index]].columns
        shape = self._options.read(value, columns)
        return Row(
            self.ids[index],
            self.sources[index],
            self.file(index),
            self.line(index),
            raw,
            shape.messages,
            shape.text,
            subtask_of(value, columns),
            shape.prompt,
            shape.completion,
            shape.masked,
            shape.flags,
            shape.tools,
            shape.settings,
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def raw(self, index: int) -> bytes:
        """Return the line of a row, byte for byte, without the newline.

        Args:
            index: The number of the row.

        Raises:
            DataError: The file has changed or cannot be read.
        """
        path, length = self._inputs[self.names.codes[index]].path, int(self._length[index])
        try:
            with open(path, "rb", buffering=0) as file:
                raw = os.pread(file.fileno(), length, int(self._offset[index]))
        except OSError as error:
            raise files.explain(error, path, "read") from error
        if xxhash.xxh3_64_intdigest(raw) != self._digest[index]:
            raise DataError(
                f"{self.where(index)} has changed since this run read it; do not edit data during a run; start again"
            )
        return raw

    def given(self, index: int) -> Given:
        """Return all columns of a row, by our names or those of its file.

        Args:
            index: The number of the row.
        """
        columns = self._inputs[self.names.codes[index]].columns
        return Given(parse_object(self.raw(index), self._options.limits), columns, self._options.preference)

    def file(self, index: int) -> str:
        """Return the input that contains a row, as it was named.

        Args:
            index: The number of the row.
        """
        return self.names[index]

    def line(self, index: int) -> int:
        """Return the line of a row in its file (for a table, the number of the row), counted from 1.

        Args:
            index: The number of the row.
        """
        return int(self.lines[index])

    def offset(self, index: int) -> int:
        """Return the byte offset of a row in its file; for a table, in the JSONL copy.

        Args:
            index: The number of the row.
        """
        return int(self._offset[index])

    def value(self, index: int, column: str) -> Any:
        """Return the value of a row in a column; None if it has none.

        Args:
            index: The number of the row.
            column: Our name of the column.
        """
        names = self._inputs[self.names.codes[index]].columns
        return parse_object(self.raw(index), self._options.limits).get(names.get(column, column))

    def where(self, index: int) -> str:
        """Return `file:line` of a row.

        Args:
            index: The number of the row.
        """
        return f"{self.file(index)}:{self.line(index)}"

    def bad_row(self, index: int, reason: str, detail: str) -> BadRow:
        """Return a `BadRow` for a row that turned out to be unusable after reading.

        Args:
            index: The number of the row.
            reason: A short code.
            detail: What is wrong.
        """
        return BadRow(self.file(index), self.line(index), self.offset(index), reason, detail)
