"""A look at the first rows of the inputs, to compare them with the named columns before anything is loaded.

It reads the first rows of JSONL, JSON and CSV files, and the schemas of Parquet and Arrow files. Rows are judged by
the reader of rows (`formats`), and faults other than wrong columns are left to it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datatools import DataError, UsageError, did_you_mean
from pipelines.rows.as_jsonl import TABLES, columns_of_table, rows_of_stream
from pipelines.rows.formats.columns import columns_of
from pipelines.rows.formats.record import WrongColumns
from pipelines.rows.formats.table import check_columns, detect, read_shape
from pipelines.rows.formats.turns import KEYS
from pipelines.rows.input_files import Source
from pipelines.rows.json_array import is_array
from pipelines.rows.jsonl import Limits, Malformed, parse_object
from pipelines.rows.unpacked import reading, unpacked
from pipelines.settings.base import Columns

ROWS, BYTES, FILES = 200, 1 << 20, 50
"""The number of rows, bytes of a packed file, and files that are read."""


@dataclass(frozen=True)
class Look:
    """The beginning of one input: its first rows, or one row of nulls that represents the schema of a table."""

    rows: list[dict[str, Any]]
    schema: bool
    whole: bool
    """Whether the input has no other rows."""


def look(source: Source, limits: Limits = Limits()) -> Look | None:  # noqa: B008 (frozen)
    """Return the first rows of an input.

    Args:
        source: The input.
        limits: The limits of one row.

    Returns:
        None for an input on the hub, and for an input that cannot be read (the reader of rows reports why).
    """
    path, form = source.path, source.form
    if path is None:
        return None
    with suppress(DataError, OSError, ValueError, EOFError, StopIteration):
        if form in TABLES:
            names = dict.fromkeys([*columns_of_table(source), *dict(source.partition)])
            return None if source.packing else Look([names], True, True)
        if form == ".json" and not source.packing and not is_array(path):
            form = ".jsonl"
        with reading(path) as raw:
            stream, cut = raw, False
            if source.packing:
                stream, cut = _beginning(unpacked(raw, source.packing))
            rows, more = _first(stream, form, source.name, limits)
            return Look([{**dict(source.partition), **row} for row in rows], False, not more and not cut)
    return None


def _beginning(blocks: Iterator[bytes]) -> tuple[io.BytesIO, bool]:
    """Return the first bytes of a packed file, and whether there are more."""
    start = b""
    for block in blocks:
        start += block
        if len(start) >= BYTES:
            return io.BytesIO(start), True
    return io.BytesIO(start), False


def _first(file: Any, form: str, name: str, limits: Limits) -> tuple[list[dict[str, Any]], bool]:
    """Return at most `ROWS` rows, and whether the file has more."""
    lines = rows_of_stream(file, form, name, limits)
    found: list[dict[str, Any]] = []
    for line in islice(lines, ROWS):
        with suppress(Malformed):
            if not isinstance(line, Malformed):
                found.append(parse_object(line, limits))
    return found, next(lines, None) is not None


def check(
    sources: Sequence[Source],
    *,
    columns: Columns | None,
    flag: str,
    source_key: str | None = None,
    preference: str | None = None,
    strict: bool = True,
    borrowed: bool = False,
) -> None:
    """Compare the first rows of all inputs with the given column names.

    Args:
        sources: The inputs.
        columns: Our names -> the data's.
        flag: The flag that gave the columns, for messages.
        source_key: The column of `--source-key`, if it was named.
        preference: How rows with a chosen and a rejected answer are read.
        strict: Whether to refuse the inputs because of one file without a usable row.
        borrowed: Whether the columns are those of other rows and may be missing.

    Raises:
        UsageError: A name is not one of ours, or no row has a named column.
        DataError: No row can be read by its columns.
    """
    known = check_columns(columns)
    seen = {source.name: found for source in sources[:FILES] if (found := look(source)) is not None and found.rows}
    refused = {}
    for name, found in seen.items():
        own, _ = columns_of(name, known)
        problems = [_problem(row, own, preference, found.schema, borrowed) for row in found.rows]
        if all(isinstance(problem, WrongColumns) for problem in problems):
            refused[name] = problems[0]
    if refused and (strict or (len(refused) == len(sources) and all(found.whole for found in seen.values()))):
        name, problem = next(iter(refused.items()))
        assert problem is not None
        rows, first = seen[name].rows, "" if seen[name].schema else ":1"
        asked = ""
        if problem.reason == "missing_column":
            asked = f"{_there(rows)}; correct {flag}"
        raise DataError(f"{name}{first}: {problem.reason} ({problem.detail}){asked}")
    if not borrowed:
        _all_named(seen, sources, known, flag)
    if source_key is not None and not any(_has(found.rows, source_key) for found in seen.values()):
        _refuse_column(seen, sources, source_key, "--source-key")


def _problem(
    row: dict[str, Any], columns: Mapping[str, str], preference: str | None, schema: bool, borrowed: bool
) -> Malformed | None:
    ways = [columns, {}] if borrowed and columns else [columns]
    last: Malformed | None = None
    for way in ways:
        try:
            if schema:
                detect(row, way)
            else:
                read_shape(row, way, preference)
            return None
        except Malformed as problem:
            last = problem
    return last


def _all_named(
    seen: Mapping[str, Look], sources: Sequence[Source], known: Mapping[str, str | dict[str, str]], flag: str
) -> None:
    """Refuse a column that was named but that none of the first rows has."""
    for ours, theirs in known.items():
        if isinstance(theirs, dict):
            here = [found for name, found in seen.items() if columns_of(name, known)[1] == ours]
            for inner, named in theirs.items():
                if here and inner not in KEYS and not any(_has(found.rows, named) for found in here):
                    _refuse_column(seen, sources, named, f"{flag} {ours}: {inner}={named}")
        elif ours not in KEYS and not any(_has(found.rows, theirs) for found in seen.values()):
            _refuse_column(seen, sources, theirs, f"{flag} {ours}={theirs}")


def _has(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in row for row in rows)


def _refuse_column(seen: Mapping[str, Look], sources: Sequence[Source], name: str, flag: str) -> None:
    if not seen or len(seen) < len(sources):  # an input that was not read may have the column
        return
    rows = [row for found in seen.values() for row in found.rows]
    files = [os.path.basename(source.name) for source in sources]
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    few = "" if all(found.whole for found in seen.values()) else f"the first {len(rows)} "
    raise UsageError(
        f"{flag}: no column {name!r} in {few}rows of {shown}"
        f"{did_you_mean(name, dict.fromkeys(key for row in rows for key in row))}"
    )


def _there(rows: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(key for row in rows for key in row)
    return f"; the columns are {', '.join(list(names)[:8])}" if names else ""
