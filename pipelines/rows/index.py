"""The usable rows of all inputs, indexed in memory, with their texts on disk."""

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from datatools import DataError, files
from pipelines.rows.formats.record import Given, WrongColumns
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.table import read_shape
from pipelines.rows.jsonl import Limits, Line, parse_object
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


@dataclass(frozen=True, slots=True)
class Options:
    """How the rows of a pool are read."""

    source_key: str
    columns: Mapping[str, str | dict[str, str]]
    detect: bool
    preference: str | None
    limits: Limits

    def read(self, value: Mapping[str, Any], columns: Mapping[str, str]) -> Shape:
        """Return the shape of a row.

        Args:
            value: The JSON object.
            columns: The columns of its file.

        Raises:
            Malformed: The row has no known format, or it is not fit to train on.
        """
        try:
            return read_shape(value, columns, self.preference)
        except WrongColumns as error:
            if not self.detect or error.reason != "missing_column":
                raise
            return read_shape(value, None, self.preference)


class Pool:
    """The usable rows of all inputs, in order. Texts stay on disk; memory is about 40 bytes per row, plus its id.

    `pool[i]` reads and parses row i again.

    Raises:
        DataError: On reading a row: the file has changed since it was indexed.
    """

    def __init__(self, options: Options) -> None:
        self.files: list[FileInfo] = []
        self.ids: list[str] = []
        """The id of each row."""
        self.sources: list[str] = []
        """The source of each row; equal names are one object."""
        self.flags: Counter[str] = Counter()
        """The number of rows with each flag: `Shape.flags`, and new_id, repeated_id, source_from_file."""
        self._options = options
        self._paths: list[Path] = []  # the files with the lines: the input itself, or its JSONL copy
        self._names: list[str] = []
        self._columns: list[dict[str, str]] = []
        self._file, self._line = array("i"), array("q")
        self._offset, self._length, self._digest = array("q"), array("q"), array("Q")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a pool of {len(self)} rows")
        index %= len(self)
        raw = self.raw(index)
        value = parse_object(raw, self._options.limits)
        columns = self._columns[self._file[index]]
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
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> dict[str, Any]:
        """Return the facts on which the content of the rows depends: the files, and how they are read."""
        rows = xxhash.xxh3_128(self._digest.tobytes())
        rows.update(self._file.tobytes())
        return {
            "files": [info.digest for info in self.files],
            "rows": rows.hexdigest(),
            "columns": self._columns,
            "detect": self._options.detect,
            "preference": self._options.preference,
            "limits": asdict(self._options.limits),
        }

    def raw(self, index: int) -> bytes:
        """Return the line of a row, byte for byte, without the newline.

        Args:
            index: The number of the row.

        Raises:
            DataError: The file has changed or cannot be read.
        """
        path, length = self._paths[self._file[index]], self._length[index]
        try:
            with open(path, "rb", buffering=0) as file:
                raw = os.pread(file.fileno(), length, self._offset[index])
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
        columns = self._columns[self._file[index]]
        return Given(parse_object(self.raw(index), self._options.limits), columns, self._options.preference)

    def file(self, index: int) -> str:
        """Return the input that contains a row, as it was named.

        Args:
            index: The number of the row.
        """
        return self._names[self._file[index]]

    def line(self, index: int) -> int:
        """Return the line of a row in its file (for a table, the number of the row), counted from 1.

        Args:
            index: The number of the row.
        """
        return self._line[index]

    def offset(self, index: int) -> int:
        """Return the byte offset of a row in its file; for a table, in the JSONL copy.

        Args:
            index: The number of the row.
        """
        return self._offset[index]

    def value(self, index: int, column: str) -> Any:
        """Return the value of a row in a column; None if it has none.

        Args:
            index: The number of the row.
            column: Our name of the column.
        """
        names = self._columns[self._file[index]]
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

    def _add(self, line: Line, identity: str, source: str, flags: tuple[str, ...]) -> None:
        assert line.raw is not None
        self.ids.append(identity)
        self.sources.append(source)
        self.flags.update(flags)
        self._file.append(len(self._paths) - 1)
        self._line.append(line.number)
        self._offset.append(line.offset)
        self._length.append(line.length)
        self._digest.append(xxhash.xxh3_64_intdigest(line.raw))


def subtask_of(value: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the subtask of a target row; None if the row names none.

    Args:
        value: The JSON object.
        columns: The columns of its file.
    """
    found = value.get(columns.get("subtask", "subtask"))
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) else None
