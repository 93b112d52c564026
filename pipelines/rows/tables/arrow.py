"""Parquet and Arrow files as lines of JSON, row by row, whatever the file unpacks to.

A table of 5 kB may contain 64 GB: one text to which a million rows point, a list of a billion equal numbers, or blocks
that compress to almost nothing. Therefore no row becomes an object before its size is known (`sizes`), a batch may
take only limited memory (`Limits.batch_bytes`), and the output is compared with the size of the file
(`as_jsonl.as_jsonl`).
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datatools import DataError
from pipelines.rows.jsonl import Limits, Malformed, shown
from pipelines.rows.tables.checks import check_footer, check_layout, check_schema, readable
from pipelines.rows.tables.sizes import MOST, sizes
from pipelines.rows.tables.values import as_json

_BATCH_ROWS = 1024
_CHUNK_BYTES = 16 << 20  # rows become objects in groups of about this size
_FREE = 512 << 20  # memory that reading any file may take, in bytes


def rows_of_parquet(path: Path, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """Yield the rows of a Parquet file as lines of JSON.

    Args:
        path: The file.
        name: The name of the file, for messages.
        limits: The limits of one input.

    Raises:
        DataError: The file cannot be read, or would need too much memory.
    """
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    with readable(name, "Parquet"), open(path, "rb") as file:
        check_footer(file, size, name)
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            check_schema(table.schema_arrow, name, limits)
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            claimed = sum(group.total_byte_size for group in groups)
            if claimed > limits.ratio_from and claimed > limits.unpacked_ratio * size:
                raise DataError(
                    f"{name} unpacks to more than {limits.unpacked_ratio} times its size (limit "
                    "unpacked_ratio); if the size is right, write the rows as JSONL yourself"
                )
            rows = max(1, table.metadata.num_rows)
            step = max(1, min(256, _CHUNK_BYTES * rows // max(1, claimed)))
            yield from _rows(table.iter_batches(batch_size=step, use_threads=False), size, name, limits)


def rows_of_arrow(path: Path, name: str, limits: Limits) -> Iterator[bytes | Malformed]:
    """Yield the rows of an Arrow file in either form: with an index at its end, or as a stream (as `datasets` writes).

    Args:
        path: The file.
        name: The name of the file, for messages.
        limits: The limits of one input.

    Raises:
        DataError: The file cannot be read, or would need too much memory.
    """
    import pyarrow

    size = path.stat().st_size
    with readable(name, f"Arrow ({path.name})"), pyarrow.OSFile(str(path)) as file:
        with _at_most(size, name, limits):
            reader, batches = _reader(file)
        check_schema(reader.schema, name, limits)
        yield from _rows(batches, size, name, limits)


def _reader(file: Any) -> tuple[Any, Iterator[Any]]:
    """Return the reader of an open Arrow file in either form, and its batches."""
    import pyarrow

    indexed = file.read(6) == b"ARROW1"
    file.seek(0)
    pool = pyarrow.system_memory_pool()
    if indexed:
        reader = pyarrow.ipc.open_file(file, memory_pool=pool)
        return reader, (reader.get_batch(i) for i in range(reader.num_record_batches))
    reader = pyarrow.ipc.open_stream(file, memory_pool=pool)
    return reader, iter(reader)


def columns_of_parquet(path: Path, name: str) -> list[str]:
    """Return the columns of a Parquet file without reading rows.

    Args:
        path: The file.
        name: The name of the file, for messages.

    Raises:
        DataError: The file cannot be read.
    """
    import pyarrow.parquet

    with readable(name, "Parquet"):
        return list(pyarrow.parquet.read_schema(path).names)


def columns_of_arrow(path: Path, name: str) -> list[str]:
    """Return the columns of an Arrow file without reading rows.

    Args:
        path: The file.
        name: The name of the file, for messages.

    Raises:
        DataError: The file cannot be read.
    """
    import pyarrow

    with readable(name, f"Arrow ({path.name})"), pyarrow.OSFile(str(path)) as file:
        return list(_reader(file)[0].schema.names)


@contextlib.contextmanager
def _at_most(size: int, name: str, limits: Limits) -> Iterator[None]:
    """Limit the growth of the process to what a table of `size` bytes may take, because Arrow trusts the file.

    This works on Linux only; elsewhere the size of a batch is checked after it has been read.
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
            f"than {most} bytes of memory (limits unpacked_ratio and batch_bytes); it may be damaged; if not, "
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
        sure = check_layout(batch)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from _rows_of_batch(batch.slice(start, _BATCH_ROWS), limits, sure)
        del batch  # before the next one is read


def _rows_of_batch(batch: Any, limits: Limits, sure: bool) -> Iterator[bytes | Malformed]:
    """Yield at most `_BATCH_ROWS` rows, which become objects a few at a time."""
    n = batch.num_rows
    most = np.zeros(n, np.int64)
    for array in batch.columns:
        most += np.minimum(sizes(array), MOST)
    start = 0
    while start < n:
        if most[start] > limits.line_bytes:
            yield Malformed("line_too_long", f"more than {limits.line_bytes} bytes (limit line_bytes)")
            start += 1
            continue
        end, total = start, 0
        while (
            end < n
            and most[end] <= limits.line_bytes
            and (end == start or (sure and total + most[end] <= _CHUNK_BYTES))
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
    """Return what is wrong with the one row of `batch`; texts are checked when they become objects."""
    import pyarrow

    for field, array in zip(batch.schema, batch.columns, strict=True):
        with contextlib.suppress(pyarrow.ArrowNotImplementedError):
            array = array.take(pyarrow.array([0]))  # without the data of other rows
        try:
            array.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):
                return Malformed("value_out_of_range", f"{_column(field)}: {shown(str(error).splitlines()[0], 120)}")
    return None


def _objects(batch: Any) -> Iterator[bytes | Malformed]:
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except Exception:  # from Arrow, Python's dates or a time-zone library: try the rows one by one
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
    """Return what is wrong with the one row of `batch`."""
    for field, array in zip(batch.schema, batch.columns, strict=True):
        try:
            array.to_pylist(maps_as_pydicts="strict")
        except Exception as error:  # as in `_objects`
            column = _column(field)
            if isinstance(error, UnicodeDecodeError):
                return Malformed(
                    "invalid_utf8", f"{column}: byte 0x{error.object[error.start]:02x} at byte {error.start} of a text"
                )
            if "zoneinfo" in str(error):  # Arrow's message for an unknown time zone
                return Malformed("unknown_time_zone", column)
            first = shown((str(error).strip() or type(error).__name__).splitlines()[0], 120)
            if isinstance(error, KeyError):
                return Malformed("duplicate_key", f"{column}: {first}")
            return Malformed("value_out_of_range", f"{column}: {first}")
    return Malformed("unreadable_value", "the row cannot be read")


def _column(field: Any) -> str:
    return f"column {shown(field.name)} ({shown(str(field.type))})"
