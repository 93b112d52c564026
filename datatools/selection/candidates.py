"""The input (`Candidates`) and the output (`Selection`) of selectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from datatools import large
from datatools.errors import DataError, UsageError

Array = Tensor | NDArray[Any] | Sequence[float] | Sequence[bool]
_ONES = torch.ones(0)


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen rows, best first.

    Attributes:
        indices: int64 [k], positions in the pool, each at most once.
        weights: float32 [k], the weight of each row in training; 1 unless a selector sets others.
        scores: float32 [n], the scores of the whole pool, if there are any.
        why: [k], one sentence per row.

    Raises:
        ValueError: if indices have another dtype or shape or are repeated, or the numbers of weights or reasons differ.

    Example:
        >>> selection = Selection(torch.tensor([7, 2]))
        >>> len(selection), selection.weights.tolist()
        (2, [1.0, 1.0])

    """

    indices: Int64[Tensor, " k"]
    weights: Float[Tensor, " k"] = _ONES
    scores: Float[Tensor, " n"] | None = None
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
                f"{'no' if self.why is None else len(self.why)} reasons; their numbers must be equal"
            )
        if len(set(self.indices.tolist())) != k:
            raise ValueError("Selection.indices contains a row twice")

    def __len__(self) -> int:
        return len(self.indices)


class Candidates:
    """The rows that a selector may choose from, as columns of equal length n.

    Columns may be tensors, numpy arrays or lists; they are not changed.

    Args:
        keys: [n], the content hash of each row. Ties are broken by key, so that the order of input files never affects
            the choice. A sequence with a method `order` (see `sorted_by`) is used as it is.
        scores: float32 [n], higher is better; needed by `top_k`. Finite for eligible rows.
        sources: [n], for caps per source; "" by default.
        tokens: int64 [n], all tokens of each row; needed by token budgets.
        supervised: int64 [n], tokens with a loss; needed by `random_length`.
        eligible: bool [n], rows that may be chosen (not duplicates, not non-finite, ...); all rows by default.
        similarity: floating dtype [n, m], of each row to each of m >= 1 target rows; needed by `round_robin`,
            `bids` and `coverage`. Finite for eligible rows.
        groups: int64 [m], the subtask of each target row; one subtask by default.

    Raises:
        ValueError: if columns have unequal lengths.
        DataError: if scores or similarities of eligible rows are not finite.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"], scores=[0.1, 0.9, 0.5], eligible=[True, True, False])
        >>> len(pool), int(pool.eligible.sum())
        (3, 2)

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
        similarity: Tensor | NDArray[Any] | Sequence[Sequence[float]] | None = None,
        groups: Array | None = None,
    ) -> None:
        n = len(keys)
        self.keys = keys
        self.sources = _Blank(n) if sources is None else sources
        self.scores = None if scores is None else _column(scores, torch.float32)
        self.tokens = None if tokens is None else _column(tokens, torch.int64)
        self.supervised = None if supervised is None else _column(supervised, torch.int64)
        self.eligible = torch.ones(n, dtype=torch.bool) if eligible is None else _column(eligible, torch.bool)
        for name in ("scores", "sources", "tokens", "supervised", "eligible"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(
                    f"Candidates: {n} keys but {len(value)} {name}; every column must have one entry per row"
                )
        if self.scores is not None:
            require_finite(self.scores, self.keys, "scores", where=self.eligible)
        self.similarity = None if similarity is None else torch.as_tensor(similarity).detach().cpu()
        self.groups: Tensor | None = None
        if self.similarity is not None:
            if self.similarity.ndim != 2 or len(self.similarity) != n or not self.similarity.shape[1]:
                raise ValueError(
                    f"Candidates: {n} keys but a similarity of shape {list(self.similarity.shape)}; expected one row "
                    "per key and one column per target row"
                )
            m = self.similarity.shape[1]
            self.groups = torch.zeros(m, dtype=torch.int64) if groups is None else _column(groups, torch.int64)
            if len(self.groups) != m:
                raise ValueError(f"Candidates: {m} target rows but {len(self.groups)} groups")
            require_finite(self.similarity, self.keys, "similarity", where=self.eligible)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def token_sizes(self) -> NDArray[np.int64]:
        """Tokens of each row, at least 1, int64 [n].

        Raises:
            UsageError: if there are no token counts.

        """
        if self.tokens is None:
            raise UsageError("a token budget needs the rows' token counts, which are missing; ask for a number of rows")
        sizes: NDArray[np.int64] = self.tokens.clamp_min(1).numpy()
        return sizes

    @cached_property
    def rank_of_key(self) -> NDArray[np.int64]:
        """The rank of each row when sorted by (key, position), int64 [n]; it breaks ties."""
        rank = np.empty(len(self), dtype=np.int64)
        rank[sorted_by(self.keys)] = np.arange(len(self))
        return rank

    def order(self, descending: NDArray[Any]) -> NDArray[np.int64]:
        """Sort the eligible rows.

        Args:
            descending: values [n]; rows are sorted from high to low, ties by key.

        Returns:
            Positions of the eligible rows, int64.

        Example:
            >>> Candidates(keys=["a", "b", "c"]).order(np.array([0.1, 0.9, 0.5])).tolist()
            [1, 2, 0]

        """
        rows = np.flatnonzero(self.eligible.numpy())
        return rows[np.lexsort((self.rank_of_key[rows], -descending[rows]))]


class _Blank(Sequence[str]):
    """Empty texts."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        return [""] * len(range(self._n)[index]) if isinstance(index, slice) else ""


def sorted_by(keys: Sequence[str], rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Sort positions by key, ties by position.

    Args:
        keys: [n]; if they have a method `order`, it returns all positions in this order without making the texts.
        rows: int64 [k], ascending, the positions to sort; by default all.

    Returns:
        int64.

    Example:
        >>> sorted_by(["b", "a", "c"]).tolist()
        [1, 0, 2]

    """
    if not hasattr(keys, "order"):
        chosen = range(len(keys)) if rows is None else rows.tolist()
        return np.asarray(sorted(chosen, key=keys.__getitem__), dtype=np.int64)
    order: NDArray[np.int64] = keys.order()
    if rows is None:
        return order
    wanted = np.zeros(len(keys), dtype=np.bool_)
    wanted[rows] = True
    return order[wanted[order]]


def _column(values: Array, dtype: torch.dtype) -> Tensor:
    column = torch.as_tensor(np.asarray(values) if isinstance(values, Sequence) else values)
    if column.ndim != 1:
        raise ValueError(f"Candidates: a column of shape {list(column.shape)}; expected one dimension")
    return column.detach().cpu().to(dtype)


def require_finite(
    values: Float[Tensor, " n *m"], keys: Sequence[str], what: str, *, where: Bool[Tensor, " n"] | None = None
) -> None:
    """Refuse values that are not finite.

    Args:
        values: floating dtype [n] or [n, m].
        keys: [n], the names of the rows.
        what: what the values are, for the message.
        where: bool [n], the rows to check; all rows by default.

    Raises:
        DataError: if a row is not finite; the message names the first ones.

    """
    bad = torch.zeros(len(values), dtype=torch.bool)
    for rows in large.blocks(values) if values.ndim == 2 else (slice(None),):
        found = ~values[rows].isfinite()
        bad[rows] = found.any(1) if found.ndim == 2 else found
    if where is not None:
        bad &= where
    wrong = bad.nonzero().flatten().tolist()
    if wrong:
        names = ", ".join(keys[row] for row in wrong[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(
            f"{what}: {len(wrong)} rows are not finite: {names}{more}; "
            "mark these rows as not eligible, or compute them again"
        )
