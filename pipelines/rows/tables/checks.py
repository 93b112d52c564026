"""Checks of a table's own description, before any of its rows is read."""

import contextlib
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datatools import DataError, files
from pipelines.rows.jsonl import Limits, shown

_FOOTER_BYTES = 32 << 20  # of a Parquet file; at least 40 bytes for each column of each row group


@contextlib.contextmanager
def readable(name: str, form: str) -> Iterator[None]:
    """Turn errors of Arrow into a DataError that names the file.

    Args:
        name: The name of the file.
        form: The form of the file.

    Raises:
        DataError: The file cannot be read.
    """
    import pyarrow

    try:
        yield
    except MemoryError as error:
        raise DataError(
            f"cannot read {name} as {form}: it needs more memory than is available; write it in smaller row "
            "groups or batches"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, pyarrow.ArrowException):
            raise files.explain(error, Path(name), "read") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read {name} as {form}: {first}") from error


def check_footer(file: BinaryIO, size: int, name: str) -> None:
    """Refuse a file whose footer is so long that reading it takes gigabytes.

    Args:
        file: The file.
        size: The size of the file in bytes.
        name: The name of the file, for messages.

    Raises:
        DataError: The footer is too long.
    """
    if size >= 12:
        file.seek(-8, os.SEEK_END)
        length, magic = struct.unpack("<I4s", file.read(8))
        if magic == b"PAR1" and length > _FOOTER_BYTES:
            raise DataError(
                f"cannot read {name} as Parquet: it describes its columns and row groups in {length} "
                f"bytes; the limit is {_FOOTER_BYTES}; write it in fewer, larger row groups"
            )
    file.seek(0)


def check_schema(schema: Any, name: str, limits: Limits) -> None:
    """Refuse two columns with the same name, at any depth, because a JSON object can only have one of them.

    Args:
        schema: The schema.
        name: The name of the file, for messages.
        limits: The limits of one input.

    Raises:
        DataError: Two columns have one name, or the schema is too wide or too deep.
    """
    if len(schema) > limits.values:
        raise DataError(f"{name} has {len(schema)} columns; the limit is {limits.values} (limit values)")
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
    """Return the fields inside a type, and whether they are distinguished by their names."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return [pyarrow.field("", kind.storage_type)], False
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return [pyarrow.field("", kind.value_type)], False
    return [kind.field(i) for i in range(kind.num_fields)], pyarrow.types.is_struct(kind)


def check_layout(batch: Any) -> bool:
    """Return whether all values of a batch are valid.

    Args:
        batch: The batch.

    Raises:
        ArrowInvalid: Offsets point outside of the batch, so that other memory would be read.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        raw = [array.view(_layout(array.type)) for array in batch.columns]
        pyarrow.RecordBatch.from_arrays(raw, [str(i) for i in range(len(raw))]).validate(full=True)
        return False
    return True


def _layout(kind: Any) -> Any:
    """Return the type with the same layout whose values are all valid: bytes for text, numbers for times."""
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
