"""The columns of `scores.parquet` and `selected.parquet`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from datatools import Selection
from datatools.compact import Names
from pipelines.select.scored import Context, Scored
from pipelines.select.summary import Ranking
from pipelines.settings import redaction

MOST_COLUMNS = 1000
"""The maximum number of columns of `selected.parquet`, and of fields in one column; values beyond it are JSON text."""


def score_columns(
    context: Context, scored: Scored, chosen: Sequence[int], order: Ranking, rows: slice = slice(None)
) -> dict[str, Any]:
    """Return, per pool row, its place, size, status, score, rank, nearest target row, and whether it was selected.

    Args:
        context: What was scored.
        scored: The scores.
        chosen: The selected pool rows.
        order: The ranks of pool rows.
        rows: Consecutive pool rows; by default all.

    Returns:
        Name of the column -> Arrow array.
    """
    pool = context.pool
    start, end, _ = rows.indices(len(pool))
    n, rows = end - start, slice(start, end)
    taken = np.zeros(len(pool), np.bool_)
    taken[list(chosen)] = True
    status = pool.status
    for name in set(scored.status.values()):
        status = status.replaced([row for row, state in scored.status.items() if state == name], name)
    files = Names(pool.pool.names.codes, [redaction.hide(name) for name in pool.pool.names.names])
    ranks = order.of[rows]
    columns: dict[str, Any] = {
        "_id": pool.pool.ids.arrow(start, end),
        "_source": _texts(pool.pool.sources, rows),
        "_file": _texts(files, rows),
        "_line": pa.array(pool.pool.lines[rows], pa.int64()),
        "_key": pa.array([pool.keys[i] for i in range(start, end)], pa.string()),
        "_tokens": pa.array(pool.scan.tokens[rows], pa.int32()),
        "_supervised": pa.array(pool.scan.supervised[rows], pa.int32()),
        "_status": _texts(status, rows),
        "_score": _floats(scored.scores[rows]),
        "_rank": pa.array(ranks, pa.int64(), mask=ranks == 0),
        "_selected": pa.array(taken[rows], pa.bool_()),
        "_norm": _floats(scored.norms[rows]) if scored.norms is not None else pa.nulls(n, pa.float32()),
    }
    places, similarity = (part[rows] for part in scored.nearest)
    ids: list[str] = []
    if context.target is not None:
        ids = [context.target.pool.ids[i] for i in np.flatnonzero(context.target.usable).tolist()]
    none = places < 0 if ids else np.ones(n, np.bool_)
    columns["_nearest"] = pa.array(ids, pa.string()).take(pa.array(places, pa.int64(), mask=none))
    columns["_nearest_similarity"] = pa.array(similarity, pa.float32(), mask=none)
    return columns | {f"subtask:{name}": _floats(values[rows]) for name, values in scored.subtasks.items()}


def _texts(names: Names, rows: slice) -> pa.Array:
    return pa.array(names.names, pa.string()).take(pa.array(names.codes[rows], pa.int32()))


def _floats(values: torch.Tensor) -> pa.Array:
    """Return float32 values, with null instead of NaN and infinity."""
    return pa.array(values.numpy(), pa.float32(), mask=~values.isfinite().numpy())


def selected_columns(
    context: Context, scored: Scored, selection: Selection, order: Ranking, why: Sequence[str]
) -> dict[str, Any]:
    """Return the rows' own columns unchanged (nested ones as JSON where rows disagree on types), and ours.

    Args:
        context: What was scored.
        scored: The scores.
        selection: The selected rows.
        order: The ranks of pool rows.
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
        "_rank": pa.array([int(order.of[i]) or None for i in chosen], pa.int64()),
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
