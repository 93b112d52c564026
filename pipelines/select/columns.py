"""The columns of `scores.parquet` and `selected.parquet`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from datatools import Selection
from pipelines.rows.rows import Rows
from pipelines.select.scored import Context, Scored
from pipelines.settings import redaction

MOST_COLUMNS = 1000
"""The maximum number of columns of `selected.parquet`, and of fields in one column; values beyond it are JSON text."""


def score_columns(context: Context, scored: Scored, chosen: Sequence[int], order: Mapping[int, int]) -> dict[str, Any]:
    """Return, per pool row, its place, size, status, score, rank, nearest target row, and whether it was selected.

    Args:
        context: What was scored.
        scored: The scores.
        chosen: The selected pool rows.
        order: Pool row -> rank.

    Returns:
        Name of the column -> Arrow array [n].
    """
    pool = context.pool
    n = len(pool)
    rows = range(n)
    taken, shown = set(chosen), cache(redaction.hide)
    columns: dict[str, Any] = {
        "_id": pa.array([pool.pool.ids[i] for i in rows], pa.string()),
        "_source": pa.array(pool.pool.sources, pa.string()),
        "_file": pa.array([shown(pool.pool.file(i)) for i in rows], pa.string()),
        "_line": pa.array([pool.pool.line(i) for i in rows], pa.int64()),
        "_key": pa.array(pool.keys, pa.string()),
        "_tokens": pa.array(pool.scan.tokens, pa.int32()),
        "_supervised": pa.array(pool.scan.supervised, pa.int32()),
        "_status": pa.array([_status(pool, scored, i) for i in rows], pa.string()),
        "_score": _floats(scored.scores),
        "_rank": pa.array([order.get(i) for i in rows], pa.int64()),
        "_selected": pa.array([i in taken for i in rows], pa.bool_()),
        "_norm": _floats(scored.norms) if scored.norms is not None else pa.nulls(n, pa.float32()),
    }
    nearest: list[str | None] = [None] * n
    similarities: list[float | None] = [None] * n
    if context.target is not None:
        ids = [context.target.pool.ids[i] for i in np.flatnonzero(context.target.usable).tolist()]
        for row, (place, similarity) in scored.nearest.items():
            nearest[row], similarities[row] = ids[place], similarity
    columns["_nearest"] = pa.array(nearest, pa.string())
    columns["_nearest_similarity"] = pa.array(similarities, pa.float32())
    return columns | {f"subtask:{name}": _floats(values) for name, values in scored.subtasks.items()}


def _status(pool: Rows, scored: Scored, index: int) -> str:
    return scored.status.get(index, pool.status[index])


def _floats(values: torch.Tensor) -> pa.Array:
    """Return float32 values, with null instead of NaN and infinity."""
    return pa.array(values.numpy(), pa.float32(), mask=~values.isfinite().numpy())


def selected_columns(
    context: Context, scored: Scored, selection: Selection, order: Mapping[int, int], why: Sequence[str]
) -> dict[str, Any]:
    """Return the rows' own columns unchanged (nested ones as JSON where rows disagree on types), and ours.

    Args:
        context: What was scored.
        scored: The scores.
        selection: The selected rows.
        order: Pool row -> rank.
        why: One sentence per selected row.

    Returns:
        Name of the column -> Arrow array [k].
    """
    pool = context.pool
    chosen = [int(i) for i in selection.indices]
    parsed = [json.loads(pool.pool.raw(i).decode("utf-8", "replace").removeprefix("\ufeff")) for i in chosen]
    held = Counter(name for value in parsed for name in value if not name.startswith("_"))
    columns: dict[str, Any] = {}
    common = {name for name, _ in held.most_common(MOST_COLUMNS)}
    for name in (name for name in held if name in common):
        columns[name] = column([value.get(name) for value in parsed])
    if len(held) > MOST_COLUMNS:  # names are data here: with one column each, the table would consist of nulls
        others = [{k: v for k, v in value.items() if k in held and k not in columns} for value in parsed]
        columns["_others"] = pa.array([json.dumps(other) for other in others], pa.string())
    return columns | {
        "_id": pa.array([pool.pool.ids[i] for i in chosen], pa.string()),
        "_source": pa.array([pool.pool.sources[i] for i in chosen], pa.string()),
        "_score": _floats(scored.scores[selection.indices]),
        "_rank": pa.array([order.get(i) for i in chosen], pa.int64()),
        "_weight": pa.array(selection.weights.numpy(), pa.float32()),
        "_why": pa.array(list(why), pa.string()),
    }


def column(values: Sequence[Any]) -> pa.Array:
    """Return JSON values as an Arrow column, or as JSON text if they have no common type that Parquet can hold.

    Args:
        values: One value per row.
    """
    if _fields(values) > MOST_COLUMNS:  # every row would have fields for the keys of all others
        return pa.array([None if v is None else json.dumps(v) for v in values], pa.string())
    try:
        found = pa.array(values)
        if not _hollow(found.type):
            return found
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return pa.array([None if v is None else json.dumps(v) for v in values], pa.string())


def _fields(values: Iterable[Any]) -> int:
    """Return the number of fields of an Arrow type of all `values`, at any depth: one per position of a key."""
    known: set[tuple[str, ...]] = set()
    pending: list[tuple[tuple[str, ...], Any]] = [((), value) for value in values]
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                known.add((*place, key))
                pending.append(((*place, key), item))
        elif isinstance(value, list):
            pending += [(place, item) for item in value if isinstance(item, dict | list)]
    return len(known)


def _hollow(kind: pa.DataType) -> bool:
    """Return whether the type contains a struct without fields, which Parquet cannot write."""
    return (pa.types.is_struct(kind) and kind.num_fields == 0) or any(
        _hollow(kind.field(i).type) for i in range(kind.num_fields)
    )
