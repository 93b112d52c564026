"""Columns in the names of folders (`lang=en/part-0.parquet`), as Hive, Spark and pyarrow write partitioned tables."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipelines.rows.jsonl import Limits, Malformed, parse_object, shown

Partition = tuple[tuple[str, Any], ...]
"""(column, value) of each folder above a file."""

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?[0-9]+")


def partitions(files: Sequence[Path], top: Path) -> list[Partition]:
    """Return the columns that the folders above each file name, with numbers where every value of a column is one.

    Folders count below `top`, and directly above it.

    Args:
        files: The files of one input.
        top: The folder or file that was named.
    """
    above = list(top.parents) if top in files else [top, *top.parents]
    first = next((k for k, folder in enumerate(above) if "=" not in folder.name), len(above))
    named = [folder.name for folder in reversed(above[:first])]
    found: list[dict[str, str]] = []
    for file in files:
        inside = list(file.relative_to(top).parts[:-1]) if file != top and file.is_relative_to(top) else []
        pairs = (part.partition("=") for part in [*named, *inside])
        found.append({unquote(key): unquote(value) for key, between, value in pairs if between and key})
    numbers = {
        key
        for key in {key for pairs in found for key in pairs}
        if all(_is_int32(pairs[key]) for pairs in found if pairs.get(key, _NULL) != _NULL)
    }
    return [
        tuple((key, None if v == _NULL else int(v) if key in numbers else v) for key, v in pairs.items())
        for pairs in found
    ]


def _is_int32(value: str) -> bool:
    return bool(_INTEGER.fullmatch(value)) and -(2**31) <= int(value) < 2**31


def with_partition(
    rows: Iterator[bytes | Malformed], partition: Partition, limits: Limits
) -> Iterator[bytes | Malformed]:
    """Yield rows with the columns that their folders name; the rest of each line stays as it is.

    Args:
        rows: Lines of JSON.
        partition: The columns.
        limits: The limits of one row.
    """
    for row in rows:
        if isinstance(row, Malformed) or not row:
            yield row
            continue
        try:
            held = parse_object(row, limits)
            missing = _missing(held, partition)
        except Malformed as error:
            yield error if error.reason == "partition" else row  # other faults are the reader's, as everywhere
            continue
        if not missing:
            yield row
            continue
        if any(key in held for key in missing):  # a null of the row's own
            yield json.dumps({**held, **missing}).encode("ascii")
            continue
        start = row.index(b"{") + 1
        added = json.dumps(missing).encode("ascii")[1:-1]
        yield row[:start] + added + (b", " if held else b"") + row[start:].lstrip()


def _missing(held: Mapping[str, Any], partition: Partition) -> dict[str, Any]:
    for key, value in partition:
        own = held.get(key)
        if own not in (None, "") and own != value and str(own) != str(value):
            raise Malformed(
                "partition",
                f"the column {shown(key, 30)} is {shown(repr(own), 30)}, but the row's folder is {key}={value}; rename "
                "the folder or the column",
            )
    return {
        key: value for key, value in partition if held.get(key) in (None, "") and not (key in held and value is None)
    }
