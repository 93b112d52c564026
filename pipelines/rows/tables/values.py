"""The values of a table as JSON."""

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

from pipelines.rows.jsonl import Malformed


def as_json(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON.

    Args:
        row: Column -> value.

    Raises:
        Malformed: The row has a value that cannot be written as JSON.
    """
    return json.dumps(_plain(row), allow_nan=False).encode("ascii")


def _plain(value: Any) -> Any:
    """Return a table's value as JSON.

    Times become ISO text, decimals their digits, and bytes the text that they are in UTF-8. NaN, infinities (a table's
    missing numbers) and other bytes (pictures) become null.

    Raises:
        Malformed: The value cannot be written as JSON.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        found = {key if isinstance(key, str) else str(_plain(key)): _plain(item) for key, item in value.items()}
        if len(found) != len(value):
            raise Malformed("duplicate_key", "two keys of a map have the same text")
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
    """Return a value of the rarer types as JSON."""
    if type(value).__name__ in ("NaTType", "NAType"):  # what is missing in pandas
        return None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return _duration(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, tuple | np.ndarray):  # also an interval: months, days, nanoseconds
        return [_plain(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, Integral):  # of numpy; as a float it would lose digits
        return int(value)
    if isinstance(value, Real):
        return _plain(float(value))
    raise Malformed("unreadable_value", f"a {type(value).__name__}, which cannot be written as JSON")


def _duration(value: timedelta) -> str:
    """Return a duration in ISO 8601, such as P1DT3600.5S."""
    nanoseconds = (value.days * 86400 + value.seconds) * 10**9 + value.microseconds * 1000
    nanoseconds += getattr(value, "nanoseconds", 0)
    days, rest = divmod(abs(nanoseconds), 86400 * 10**9)
    seconds = f"{rest // 10**9}" + (f".{rest % 10**9:09d}".rstrip("0") if rest % 10**9 else "")
    return f"{'-' if nanoseconds < 0 else ''}P{days}DT{seconds}S"


def rows_of_mappings(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes | Malformed]:
    """Yield rows that a library has read as lines of JSON.

    Args:
        rows: The rows.
    """
    for row in rows:
        try:
            yield as_json(row)
        except Malformed as error:
            yield error
