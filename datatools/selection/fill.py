"""Filling a budget in a given order, within a cap per source: what every selector ends with."""

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from datatools.errors import UsageError
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates


def fill(
    order: NDArray[np.int64], candidates: Candidates, budget: Budget, max_per_source: str | float | None = None
) -> list[int]:
    """Take rows from `order` until the budget is full, within the cap per source.

    A row budget takes the first k rows whose source has room. A token budget passes over a row that does not fit into
    what is left (of the budget or of its source's cap) and may still take shorter rows after it; it ends when no row
    can fit. So less than the shortest row's tokens is left over, unless a cap holds rows back.

    Args:
        order: int64 [m], eligible rows, best first.
        candidates: the rows.
        budget: how much to take.
        max_per_source: below 1 (or "30%") a share of the budget, in rows or tokens as the budget is; from 1 on a
            number of rows.

    Returns:
        The rows taken, in their order.

    Raises:
        UsageError: for a cap that leaves a row budget unfilled, and see `Budget.resolve`.

    >>> pool = Candidates(keys=["a", "b", "c"], sources=["x", "x", "y"])
    >>> fill(np.array([0, 1, 2]), pool, Budget.parse(2), max_per_source=1)
    [0, 2]
    """
    limit = budget.resolve(candidates)
    if limit.rows is not None and max_per_source is None:
        return [int(row) for row in order[: limit.rows]]
    share, count = parse_cap(max_per_source)
    sizes = np.ones(len(candidates), dtype=np.int64) if limit.tokens is None else candidates.token_sizes
    total = limit.rows if limit.tokens is None else limit.tokens
    assert total is not None
    cap = total if share is None else math.floor(share * total + 1e-9)
    if cap == 0:
        raise UsageError(
            f"max_per_source={max_per_source} of a budget of {total} is less than one; raise one of the two"
        )
    used: Counter[str] = Counter()  # by source, in the budget's own unit
    rows: Counter[str] = Counter()
    left, smallest = total, int(sizes[order].min())
    chosen: list[int] = []
    for row in order.tolist():
        if left < smallest:
            break
        source, size = candidates.sources[row], int(sizes[row])
        if size > left or used[source] + size > cap or (count is not None and rows[source] >= count):
            continue
        chosen.append(row)
        used[source] += size
        rows[source] += 1
        left -= size
    if (limit.tokens is None and left) or not chosen:
        asked = f"{total} rows" if limit.tokens is None else f"{total} tokens"
        sources = len({candidates.sources[row] for row in order.tolist()})
        raise UsageError(
            f"max_per_source={max_per_source} lets only {len(chosen)} rows of {sources} sources into a "
            f"budget of {asked}; raise the cap or lower the budget"
        )
    return chosen


def parse_cap(cap: str | float | None) -> tuple[float | None, int | None]:
    """Read a cap per source.

    Returns:
        (share, None), (None, number of rows), or (None, None) without a cap.

    Raises:
        UsageError: for anything else.

    >>> parse_cap("30%"), parse_cap(200), parse_cap(None)
    ((0.3, None), (None, 200), (None, None))
    """
    if cap is None:
        return None, None
    text = str(cap).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if text.endswith("%") and value == 1:
        return 1.0, None
    if 0 < value < 1:
        return value, None
    if not text.endswith("%") and value >= 1 and value.is_integer():
        return None, int(value)
    raise UsageError(
        f"max_per_source={text[:40]} is not understood; write a share below 1 ('0.3' or '30%') or a whole "
        "number of rows ('200')"
    )
