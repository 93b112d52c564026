"""Fill a budget in a given order, with a cap per source: the last step of every selector."""

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

    A row budget takes the first k rows whose source is below its cap. A token budget skips rows that do not fit into
    the rest of the budget or of their source's cap, and may take shorter rows after them; it ends when no row can fit.
    So the unused part is smaller than the shortest row, unless a cap excludes rows.

    Args:
        order: int64 [m], eligible rows, best first.
        candidates: the rows.
        budget: how much to take.
        max_per_source: below 1 (or "30%") a share of the budget, in the budget's unit; from 1 on a number of rows.

    Returns:
        The rows taken, in their order.

    Raises:
        UsageError: if the cap leaves a row budget unfilled, or `Budget.resolve` raises it.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"], sources=["x", "x", "y"])
        >>> fill(np.array([0, 1, 2]), pool, Budget.parse(2), max_per_source=1)
        [0, 2]

    """
    limit = budget.resolve(candidates)
    if limit.rows is not None and max_per_source is None:
        return order[: limit.rows].tolist()  # type: ignore[no-any-return]
    share, count = parse_cap(max_per_source)
    sizes = np.ones(len(candidates), dtype=np.int64) if limit.tokens is None else candidates.token_sizes
    total = limit.rows if limit.tokens is None else limit.tokens
    assert total is not None
    cap = total if share is None else math.floor(share * total + 1e-9)
    if cap == 0:
        raise UsageError(
            f"max_per_source={max_per_source} of a budget of {total} is less than one; raise one of the two"
        )
    used: Counter[str] = Counter()  # by source, in the unit of the budget
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
            f"max_per_source={max_per_source} allows only {len(chosen)} rows of {sources} sources in a "
            f"budget of {asked}; raise the cap or lower the budget"
        )
    return chosen


def parse_cap(cap: str | float | None) -> tuple[float | None, int | None]:
    """Parse a cap per source.

    Args:
        cap: a share below 1 ("30%", 0.3), a number of rows, or None.

    Returns:
        (share, None), (None, number of rows), or (None, None) without a cap.

    Raises:
        UsageError: for any other value.

    Example:
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
        f"cannot parse max_per_source={text[:40]}; write a share below 1 ('0.3' or '30%') or a whole "
        "number of rows ('200')"
    )
