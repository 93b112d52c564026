"""Scores of batches that are numeric columns of their rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from datatools import DataError
from pipelines.rows.rows import Rows

COLUMN = "column:"
"""The beginning of the name of a score that is a numeric column of the rows."""


def read_columns(names: Sequence[str], rows: Rows, batches: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Return the mean of each named column over the rows of each batch.

    Args:
        names: The names of scores; others than columns are passed over.
        rows: The rows.
        batches: The rows of each batch.

    Raises:
        DataError: A row has no such column, or its value is not a finite number; the message names the row.
    """
    found: dict[str, list[float]] = {}
    for name in names:
        if not name.startswith(COLUMN):
            continue
        column = name.removeprefix(COLUMN)
        found[name] = [math.fsum(_number(rows, row, column) for row in batch) / len(batch) for batch in batches]
    return found


def _number(rows: Rows, row: int, column: str) -> float:
    value = json.loads(rows.pool.raw(row) or b"{}").get(column)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        what = "has no such column" if value is None else f"has {value!r:.80}, which is not a finite number"
        raise DataError(f"scores: {COLUMN}{column}: the row {rows.pool.where(row)} {what}")
    return float(value)
