"""Parquet, Arrow and CSV as lines of JSON, one row after the other, whatever the file unpacks to.

A table of 5 kB may hold 64 GB: one text that a million rows point at, a list of a billion equal numbers, blocks that
compress to nothing. So nothing is made of a row before it is known how large it is (`sizes`), a batch may take only so
much memory (`Limits.batch_bytes`), and what is written is compared with the size of the file (`sources.as_jsonl`).
"""

import contextlib
import csv
import json
import math
import os
import struct
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datatools import DataError, files
from pipelines.rows.jsonl import Limits, Malformed, shown

_BATCH_ROWS = 1024
_CHUNK_BYTES = 16 << 20  # rows are made into objects in groups of about this size
_FOOTER_BYTES = 32 << 20  # of a Parquet file: what lies where; 40 bytes and more for each column of each row group
_FREE = 512 << 20  # bytes that reading any file may take
_CELL = 16  # bytes that a value counts at least, as an object and as JSON
_MOST = 1 << 40  # sizes are cut to it, so that sums stay below 2^63
_REWINDS = 16  # how many records that never end may be read again from their second line


def rows_of_parquet(path: Path, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """The rows of a Parquet file. Raises: DataError if it cannot be read, or would take too much memory."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    with _readable(name, "Parquet"), open(path, "rb") as file:
        _check_footer(file, size, name)
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            _check_schema(table.schema_arrow, name, limits)
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            claimed = sum(group.total_byte_size for group in groups)
            if claimed > limits.ratio_from and claimed > limits.unpacked_ratio * size:
                raise DataError(
                    f"{name} unpacks to more than {limits.unpacked_ratio} times its size (limit "
                    "unpacked_ratio); write it as JSONL yourself if that is right"
                )
            rows = max(1, table.metadata.num_rows)
            step = max(1, min(256, _CHUNK_BYTES * rows // max(1, claimed)))
            yield from _rows(table.iter_batches(batch_size=step, use_threads=False), size, name, limits)


def rows_of_arrow(path: Path, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """The rows of an Arrow file, in either of its forms: with an index at its end, or a stream (as `datasets` has).

    Raises: DataError if it cannot be read, or would take too much memory.
    """
    import pyarrow

    size = path.stat().st_size
    with _readable(name, f"Arrow ({path.name})"), pyarrow.OSFile(str(path)) as file:
        indexed = file.read(6) == b"ARROW1"
        file.seek(0)
        pool = pyarrow.system_memory_pool()
        with _at_most(size, name, limits):
            if indexed:
                reader = pyarrow.ipc.open_file(file, memory_pool=pool)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(file, memory_pool=pool)
                batches = iter(reader)
        _check_schema(reader.schema, name, limits)
        yield from _rows(batches, size, name, limits)


def rows_of_csv(file: BinaryIO, delimiter: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """The rows of a CSV file with a header, as lines of JSON. Memory is bounded by one record of `limits.line_bytes`.

    A record that is longer, as by a missing quotation mark, is a bad row, and reading goes on behind its first line.
    Raises: DataError if the header cannot be read.
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
                raise DataError(f"the header of the table names a column twice or none at all: {shown(str(row), 120)}")
            header = row
        elif row and len(row) != len(header):
            yield Malformed(
                "invalid_csv",
                f"{len(row)} fields where the header has {len(header)}, near line {lines.number} of the file",
            )
        elif row:
            yield as_json(dict(zip(header, row, strict=True)))


def as_json(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON. Raises: Malformed if it holds what JSON has no form for."""
    return json.dumps(_plain(row), allow_nan=False).encode("ascii")


# ---------------------------------------------------------------------------------------------------------------- CSV


class _Lines:
    """The lines of a CSV file as text, none of them and no record of them longer than `limit` bytes."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit
        self._buffer, self._at = b"", 0  # a line of the file; in it, where the next one begins
        self._offset = 0  # of that in the file
        self._rewinds = 0
        self._of_record = 0  # bytes that the record has so far
        self._first = (0, 0)  # number of the record's first line, and the offset behind it
        self.number = 0
        """Of the line that was read last."""

    def __iter__(self) -> Iterator[str]:
        return self

    def start_record(self) -> None:
        """What is read next begins a record."""
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
        end = self._buffer.find(b"\r", self._at) + 1  # a lone carriage return ends a line, too
        if end and self._buffer[end : end + 1] == b"\n":
            end += 1
        line = self._buffer[self._at : end or len(self._buffer)]
        self._at += len(line)
        self._offset += len(line)
        return line

    def give_up(self) -> tuple[int, int]:
        """Leave the record: go on behind its first line, a few times, else behind the last. Returns both numbers."""
        (first, place), last = self._first, self.number
        if first < last and self._rewinds < _REWINDS:
            self._rewinds += 1
            self.number, self._offset = first, place
            self._buffer, self._at = b"", 0
            self._file.seek(place)
        else:  # what is left of the line
            while self._buffer and not self._buffer.endswith((b"\n", b"\r")) and self._at == len(self._buffer):
                self._line()
        return first, last


# ------------------------------------------------------------------------------------------------------------- schema


@contextlib.contextmanager
def _readable(name: str, form: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except MemoryError as error:
        raise DataError(
            f"cannot read {name} as {form}: it takes more memory than there is; write it in smaller row "
            "groups or batches"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, pyarrow.ArrowException):
            raise files.explain(error, Path(name), "read") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read {name} as {form}: {first}") from error


def _check_footer(file: BinaryIO, size: int, name: str) -> None:
    """Refuse a file whose description of itself is so long that reading it takes gigabytes."""
    if size >= 12:
        file.seek(-8, os.SEEK_END)
        length, magic = struct.unpack("<I4s", file.read(8))
        if magic == b"PAR1" and length > _FOOTER_BYTES:
            raise DataError(
                f"cannot read {name} as Parquet: it describes its columns and row groups in {length} "
                f"bytes, at most {_FOOTER_BYTES} are read; write it in fewer, larger row groups"
            )
    file.seek(0)


def _check_schema(schema: Any, name: str, limits: Limits) -> None:
    """Refuse two columns of one name, at any depth: a JSON object can hold only one of them, and hides the other."""
    if len(schema) > limits.values:
        raise DataError(f"{name} has {len(schema)} columns, at most {limits.values} are read (limit values)")
    pending: list[tuple[str, list[Any], int]] = [("", list(schema), 0)]
    while pending:
        place, fields, depth = pending.pop()
        if depth > limits.depth:
            raise DataError(f"{name}: {shown(place)} is nested deeper than {limits.depth} levels (limit depth)")
        twice = next((column for column, n in Counter(field.name for field in fields).items() if n > 1), None)
        if twice is not None:
            where = f" in {shown(place)}" if place else ""
            raise DataError(f"{name} has the column {shown(twice)} twice{where}; rename or drop one of the two")
        for field in fields:
            inside, named = _inner(field.type)
            full = f"{place}.{field.name}" if place else field.name
            if named:
                pending.append((full, inside, depth + 1))
            else:
                pending += [(full, [item], depth + 1) for item in inside]


def _inner(kind: Any) -> tuple[list[Any], bool]:
    """The fields inside a type, and whether they are told apart by their names."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return [pyarrow.field("", kind.storage_type)], False
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return [pyarrow.field("", kind.value_type)], False
    return [kind.field(i) for i in range(kind.num_fields)], pyarrow.types.is_struct(kind)


# --------------------------------------------------------------------------------------------------------------- rows


@contextlib.contextmanager
def _at_most(size: int, name: str, limits: Limits) -> Iterator[None]:
    """Let the process grow only by what a table of `size` bytes may take: Arrow unpacks what a file says it holds.

    Linux only; elsewhere the size of a batch is looked at when it is there.
    """
    most = max(_FREE, 2 * size, min(limits.batch_bytes, limits.unpacked_ratio * size))
    restore = None
    if sys.platform == "linux":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted = pages * resource.getpagesize() + most
        if (soft == resource.RLIM_INFINITY or wanted < soft) and (hard == resource.RLIM_INFINITY or wanted <= hard):
            restore = (soft, hard)
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    except MemoryError as error:
        raise DataError(
            f"cannot read {name} as a table: it has {size} bytes, and one batch of its rows takes more "
            f"than {most} bytes of memory (limits unpacked_ratio and batch_bytes); it may be damaged; else "
            "write it in smaller row groups or batches"
        ) from error
    finally:
        if restore is not None:
            resource.setrlimit(resource.RLIMIT_AS, restore)


def _rows(batches: Iterator[Any], size: int, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    while True:
        with _at_most(size, name, limits):
            batch = next(batches, None)
        if batch is None:
            return
        sure = _check_layout(batch)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from _rows_of_batch(batch.slice(start, _BATCH_ROWS), limits, sure)
        del batch  # before the next one is read


def _check_layout(batch: Any) -> bool:
    """Are all values right? Raises: ArrowInvalid if offsets point elsewhere, for what is there would be read."""
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        raw = [array.view(_layout(array.type)) for array in batch.columns]
        pyarrow.RecordBatch.from_arrays(raw, [str(i) for i in range(len(raw))]).validate(full=True)
        return False
    return True


def _layout(kind: Any) -> Any:
    """The type of the same layout whose values are all valid: bytes for text, numbers for times."""
    import pyarrow as pa

    is_a = pa.types
    plain = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
        pa.date64(): pa.int64(),
    }
    if kind in plain:
        return plain[kind]
    if is_a.is_time(kind):
        return pa.int32() if is_a.is_time32(kind) else pa.int64()
    if is_a.is_decimal(kind):
        return pa.binary(kind.byte_width)
    if isinstance(kind, pa.BaseExtensionType):
        return _layout(kind.storage_type)
    if is_a.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _layout(kind.value_type), kind.ordered)
    inside = [kind.field(i).with_type(_layout(kind.field(i).type)) for i in range(kind.num_fields)]
    if is_a.is_struct(kind):
        return pa.struct(inside)
    if is_a.is_map(kind):
        return pa.map_(kind.key_field.with_type(_layout(kind.key_type)), inside[0].type.field(1))
    for of_kind, make in (
        (is_a.is_list, pa.list_),
        (is_a.is_large_list, pa.large_list),
        (is_a.is_list_view, pa.list_view),
        (is_a.is_large_list_view, pa.large_list_view),
    ):
        if of_kind(kind):
            return make(inside[0])
    if is_a.is_fixed_size_list(kind):
        return pa.list_(inside[0], kind.list_size)
    return kind


def _rows_of_batch(batch: Any, limits: Limits, sure: bool) -> Iterator[bytes | Malformed]:
    """The rows of at most `_BATCH_ROWS` rows, made into objects a few at a time."""
    n = batch.num_rows
    most = np.zeros(n, np.int64)
    for array in batch.columns:
        most += np.minimum(sizes(array), _MOST)
    start = 0
    while start < n:
        if most[start] > limits.line_bytes:
            yield Malformed("line_too_long", f"more than {limits.line_bytes} bytes (limit line_bytes)")
            start += 1
            continue
        end, total = start, 0
        while (
            end < n and most[end] <= limits.line_bytes and (end == start or sure and total + most[end] <= _CHUNK_BYTES)
        ):
            total += int(most[end])
            end += 1
        group = batch.slice(start, end - start)
        wrong = None if sure else _invalid(group)
        if wrong is None:
            yield from _objects(group)
        else:
            yield wrong
        start = end


def _invalid(batch: Any) -> Malformed | None:
    """What is wrong with the one row of `batch`, but for texts, which are looked at when they are made."""
    import pyarrow

    for field, array in zip(batch.schema, batch.columns, strict=True):
        with contextlib.suppress(pyarrow.ArrowNotImplementedError):
            array = array.take(pyarrow.array([0]))  # without what belongs to other rows
        try:
            array.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):
                return Malformed("value_out_of_range", f"{_column(field)}: {shown(str(error).splitlines()[0], 120)}")
    return None


def _objects(batch: Any) -> Iterator[bytes | Malformed]:
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except Exception:  # by Arrow, Python's dates, a library of time zones: one by one
        rows = None
    if rows is None and batch.num_rows > 1:
        for i in range(batch.num_rows):
            yield from _objects(batch.slice(i, 1))
        return
    if rows is None:
        yield _why(batch)
        return
    for row in rows:
        try:
            yield as_json(row)
        except Malformed as error:
            yield error


def _why(batch: Any) -> Malformed:
    """What is wrong with the one row of `batch`."""
    for field, array in zip(batch.schema, batch.columns, strict=True):
        try:
            array.to_pylist(maps_as_pydicts="strict")
        except Exception as error:  # as in `_objects`
            column = _column(field)
            if isinstance(error, UnicodeDecodeError):
                return Malformed(
                    "invalid_utf8", f"{column}: byte 0x{error.object[error.start]:02x} at byte {error.start} of a text"
                )
            if "zoneinfo" in str(error):  # Arrow's words for a zone that it does not find
                return Malformed("unknown_time_zone", column)
            first = shown((str(error).strip() or type(error).__name__).splitlines()[0], 120)
            if isinstance(error, KeyError):
                return Malformed("duplicate_key", f"{column}: {first}")
            return Malformed("value_out_of_range", f"{column}: {first}")
    return Malformed("unreadable_value", "the row cannot be read")


def _column(field: Any) -> str:
    return f"column {shown(field.name)} ({shown(str(field.type))})"


def sizes(array: Any) -> NDArray[np.int64] | int:
    """At least how many bytes each value takes as a Python object or JSON; one number where all take the same.

    Nothing is unpacked: what many values share counts for each of them. Cost: linear in the memory of the array.
    """
    import pyarrow as pa

    is_a, kind = pa.types, array.type
    if isinstance(kind, pa.BaseExtensionType):
        return sizes(array.storage)
    if is_a.is_dictionary(kind):
        return _taken(sizes(array.dictionary), array.indices.fill_null(0).to_numpy(zero_copy_only=False))
    if is_a.is_run_end_encoded(kind):
        ends = array.run_ends.to_numpy()
        return _taken(sizes(array.values), np.searchsorted(ends, array.offset + np.arange(len(array)), side="right"))
    if is_a.is_struct(kind):
        return sum((sizes(array.field(i)) for i in range(kind.num_fields)), _CELL)
    if is_a.is_union(kind):
        if kind.mode == "sparse":
            return sum((sizes(array.field(i)) for i in range(kind.num_fields)), _CELL)
        here = slice(array.offset, array.offset + len(array))  # pyarrow's `type_codes` leave the offset out
        codes, offsets = (np.frombuffer(array.buffers()[i], form)[here] for i, form in ((1, "i1"), (2, "<i4")))
        found = np.zeros(len(array), np.int64)
        for i, code in enumerate(kind.type_codes):
            of_kind = codes == code
            found[of_kind] = _taken(sizes(array.field(i)), offsets[of_kind])
        return found + _CELL
    if is_a.is_list_view(kind) or is_a.is_large_list_view(kind):
        first = array.offsets.to_numpy()
        return _CELL + _between(sizes(array.values), first, first + array.sizes.to_numpy())
    if is_a.is_fixed_size_list(kind):
        first = (array.offset + np.arange(len(array), dtype=np.int64)) * kind.list_size
        return _CELL + _between(sizes(array.values), first, first + kind.list_size)
    if is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_map(kind):
        inner = _CELL + sizes(array.keys) + sizes(array.items) if is_a.is_map(kind) else sizes(array.values)
        offsets = array.offsets.to_numpy()
        return _CELL + _between(inner, offsets[:-1], offsets[1:])
    if is_a.is_fixed_size_binary(kind):
        return _CELL + int(kind.byte_width)
    return _CELL + _lengths(array)


def _lengths(array: Any) -> NDArray[np.int64] | int:
    """Bytes of each text; 0 for values of one width."""
    import pyarrow as pa

    is_a, kind = pa.types, array.type
    if is_a.is_string_view(kind) or is_a.is_binary_view(kind):
        views = array.buffers()[1]
        if views is None:
            return 0
        return np.frombuffer(views, "<i4")[::4][array.offset : array.offset + len(array)].astype(np.int64)
    wide = is_a.is_large_string(kind) or is_a.is_large_binary(kind)
    if not wide and not is_a.is_string(kind) and not is_a.is_binary(kind):
        return 0
    offsets = array.buffers()[1]
    if offsets is None or not len(array):
        return 0
    found = np.frombuffer(offsets, "<i8" if wide else "<i4")[array.offset : array.offset + len(array) + 1]
    lengths: NDArray[np.int64] = found[1:].astype(np.int64) - found[:-1]
    return lengths


def _taken(values: NDArray[np.int64] | int, places: NDArray[Any]) -> NDArray[np.int64] | int:
    return values if isinstance(values, int) else values[places] if len(values) else 0


def _between(values: NDArray[np.int64] | int, first: NDArray[Any], last: NDArray[Any]) -> NDArray[np.int64]:
    """The sum of values[first:last], for each pair."""
    if isinstance(values, int):
        found = (last.astype(np.int64) - first) * float(values)
    else:
        sums = np.concatenate([[0], np.cumsum(np.minimum(values, _MOST))])
        found = sums[last] - sums[first]
    cut: NDArray[np.int64] = np.minimum(found, _MOST).astype(np.int64)
    return cut


# ------------------------------------------------------------------------------------------------------------- values


def _plain(value: Any) -> Any:
    """A table's value as JSON: times as ISO text, decimals as their digits, bytes as the text that they are in UTF-8;
    null for NaN and infinities (a table's missing number) and for other bytes (pictures). Raises: Malformed.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        found = {key if isinstance(key, str) else str(_plain(key)): _plain(item) for key, item in value.items()}
        if len(found) != len(value):
            raise Malformed("duplicate_key", "two keys of a map are one text")
        return found
    if isinstance(value, list | set):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return _one(value)


def _one(value: Any) -> Any:
    """A value of the rarer types."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, tuple | np.ndarray):  # also an interval: months, days, nanoseconds
        return [_plain(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, Real):
        return _plain(float(value))
    raise Malformed("unreadable_value", f"a {type(value).__name__}, which JSON has no form for")


def _duration(value: timedelta) -> str:
    """As ISO 8601 writes it: P1DT3600.5S."""
    nanoseconds = (value.days * 86400 + value.seconds) * 10**9 + value.microseconds * 1000
    nanoseconds += getattr(value, "nanoseconds", 0)
    days, rest = divmod(abs(nanoseconds), 86400 * 10**9)
    seconds = f"{rest // 10**9}" + (f".{rest % 10**9:09d}".rstrip("0") if rest % 10**9 else "")
    return f"{'-' if nanoseconds < 0 else ''}P{days}DT{seconds}S"


def rows_of_mappings(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes | Malformed]:
    """Rows that a library has read, as lines of JSON."""
    for row in rows:
        try:
            yield as_json(row)
        except Malformed as error:
            yield error
