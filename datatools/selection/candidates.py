"""What a selector gets (`Candidates`, `Budget`) and what it gives back (`Selection`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import DataError, UsageError
from datatools.selection.budget import Budget as Budget

Array = Tensor | NDArray[Any] | Sequence[float] | Sequence[bool]
_ONES = torch.ones(0)


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen rows, best first.

    indices: int64 [k], positions in the pool, each at most once.
    weights: float32 [k], how much each row counts in training; 1 unless a selector says otherwise.
    scores: float32 [n], the scores of the whole pool, if there were any.
    why: [k], one sentence a row.
    """

    indices: Tensor
    weights: Tensor = _ONES
    scores: Tensor | None = None
    why: list[str] | None = None

    def __post_init__(self) -> None:
        k = len(self.indices)
        if self.weights is _ONES:
            object.__setattr__(self, "weights", torch.ones(k))
        if self.indices.dtype != torch.int64 or self.indices.shape != (k,):
            raise ValueError(
                f"Selection.indices is {self.indices.dtype} {list(self.indices.shape)}; expected int64 [k]"
            )
        if self.weights.shape != (k,) or (self.why is not None and len(self.why) != k):
            raise ValueError(
                f"Selection: {k} indices, {len(self.weights)} weights and "
                f"{'no' if self.why is None else len(self.why)} sentences; they must be equally many"
            )
        if len(set(self.indices.tolist())) != k:
            raise ValueError("Selection.indices names a row twice")

    def __len__(self) -> int:
        return len(self.indices)


class Candidates:
    """The rows that a selector may choose from, as columns of equal length n.

    keys: a content hash a row. Ties are broken by it, so that the order of the input files never changes the choice.
    scores: float32 [n], higher is better; needed by `top_k`. Finite wherever `eligible`.
    sources: [n], for per-source caps; "" when not given.
    tokens: int64 [n], all tokens of the row; needed by token budgets.
    supervised: int64 [n], tokens with a loss; needed by `random_length`.
    eligible: bool [n], rows that may be chosen at all (not a duplicate, not non-finite, ...); all when not given.

    Arguments may be tensors, numpy arrays or lists; they are not written to.
    Raises: ValueError for columns of unequal length, DataError for non-finite scores of eligible rows.
    """

    def __init__(
        self,
        *,
        keys: Sequence[str],
        scores: Array | None = None,
        sources: Sequence[str] | None = None,
        tokens: Array | None = None,
        supervised: Array | None = None,
        eligible: Array | None = None,
    ) -> None:
        n = len(keys)
        self.keys = list(keys)
        self.sources = [""] * n if sources is None else list(sources)
        self.scores = None if scores is None else _column(scores, torch.float32)
        self.tokens = None if tokens is None else _column(tokens, torch.int64)
        self.supervised = None if supervised is None else _column(supervised, torch.int64)
        self.eligible = torch.ones(n, dtype=torch.bool) if eligible is None else _column(eligible, torch.bool)
        for name in ("scores", "sources", "tokens", "supervised", "eligible"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(
                    f"Candidates: {n} keys but {len(value)} {name}; every column must have one entry a row"
                )
        if self.scores is not None:
            require_finite(self.scores, self.keys, "scores", where=self.eligible)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def token_sizes(self) -> NDArray[np.int64]:
        """Tokens of each row, at least 1. Raises: UsageError if there are no token counts."""
        if self.tokens is None:
            raise UsageError(
                "a token budget needs the rows' token counts, and there are none; ask for a number of rows"
            )
        sizes: NDArray[np.int64] = self.tokens.clamp_min(1).numpy()
        return sizes

    @cached_property
    def rank_of_key(self) -> NDArray[np.int64]:
        """[n], the place of each row when sorted by (key, position): what breaks ties."""
        rank = np.empty(len(self), dtype=np.int64)
        rank[sorted(range(len(self)), key=self.keys.__getitem__)] = np.arange(len(self))
        return rank

    def order(self, descending: NDArray[Any]) -> NDArray[np.int64]:
        """Positions of the eligible rows, by `descending` [n] from high to low, ties by key."""
        rows = np.flatnonzero(self.eligible.numpy())
        return rows[np.lexsort((self.rank_of_key[rows], -descending[rows]))]


def _column(values: Array, dtype: torch.dtype) -> Tensor:
    column = torch.as_tensor(np.asarray(values) if isinstance(values, Sequence) else values)
    if column.ndim != 1:
        raise ValueError(f"Candidates: a column of shape {list(column.shape)}; expected one dimension")
    return column.detach().cpu().to(dtype)


def require_finite(values: Tensor, keys: Sequence[str], what: str, *, where: Tensor | None = None) -> None:
    """Raise DataError, naming the first rows, if `values` [n] or [n, m] is not finite in some row (of `where` [n])."""
    bad = ~values.isfinite()
    bad = bad.any(1) if bad.ndim == 2 else bad
    if where is not None:
        bad &= where
    rows = bad.nonzero().flatten().tolist()
    if rows:
        names = ", ".join(keys[row] for row in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise DataError(
            f"{what}: {len(rows)} rows are not finite: {names}{more}; "
            "mark these rows as not eligible, or compute them again"
        )


# ---------------------------------------------------------------- filling a budget in order


def fill(
    order: NDArray[np.int64], candidates: Candidates, budget: Budget, max_per_source: str | float | None = None
) -> list[int]:
    """Rows taken from `order` (eligible rows, best first) until the budget is full, within the per-source cap.

    Row budgets: the first k rows whose source has room. Token budgets: a row that does not fit into what is left (of
    the budget or of its source's cap) is passed over and shorter ones behind it may still be taken; the end is
    reached when no row can fit. So less than the shortest row's tokens is left over, unless a cap holds rows back.
    max_per_source: below 1 (or "30%") a share of the budget, in rows or tokens as the budget is; from 1 on a number
    of rows.
    Raises: UsageError for a cap that leaves a row budget unfilled, and see `Budget.resolve`.
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
    """(share, None), (None, number of rows) or (None, None) for `max_per_source`. Raises: UsageError."""
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
