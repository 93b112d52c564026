"""Aggregations: one score per row from its similarities to many target rows. `AGGREGATIONS` is the table by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from datatools import large
from datatools.errors import UsageError, did_you_mean
from datatools.selection.bids import bids_order
from datatools.selection.candidates import require_finite, sorted_by
from datatools.selection.round_robin import round_robin_order
from datatools.selection.subtasks import subtask_means as subtask_means


def _less(similarity: Tensor, groups: Tensor) -> Tensor:
    """Mean over the target rows of a subtask, then maximum over subtasks, as in LESS's code."""
    return subtask_means(similarity, groups).amax(1)


def _paper(similarity: Tensor, groups: Tensor) -> Tensor:
    """Maximum over subtasks whose gradients were averaged before the cosine (`influence_paper`), as in LESS's paper."""
    if len(set(groups.tolist())) != len(groups):
        raise UsageError(
            "aggregation 'paper' averages the target's gradients before the cosine: pass the "
            "similarity of influence_paper, with one column per subtask, or use 'less'"
        )
    return similarity.float().amax(1)


def _mean(similarity: Tensor, groups: Tensor) -> Tensor:
    """Mean over the target rows of a subtask, then over subtasks, so that subtasks count equally."""
    return subtask_means(similarity, groups).mean(1)


def _max(similarity: Tensor, groups: Tensor) -> Tensor:
    """Maximum over target rows."""
    return similarity.float().amax(1)


def _round_robin(similarity: Tensor, groups: Tensor) -> Tensor:
    """Target rows take turns, each taking its best remaining row; the score decreases along that order."""
    return _falling(round_robin_order(similarity))


def _bids(similarity: Tensor, groups: Tensor) -> Tensor:
    """The least-served subtask repeatedly takes its best remaining row; the score decreases along that order."""
    return _falling(bids_order(similarity, groups))


def _falling(order: NDArray[np.int64]) -> Tensor:
    """Return the score of each row: 1 for the first of `order`, decreasing in equal steps to 1 / n for the last."""
    n = len(order)
    scores = np.empty(n, dtype=np.float32)
    scores[order] = 1 - np.arange(n) / n
    return torch.from_numpy(scores)


@dataclass(frozen=True)
class Aggregation:
    """One entry of `AGGREGATIONS`: a function, described by its docstring, and the meaning of its scores.

    Attributes:
        function: (similarity [n, m], n >= 1, in which the earlier row wins ties; groups int64 [m]) -> scores float32
            [n].
        formula: the words before the similarity in a formula.
        places: whether a score is a position in an order (1 for the first), and not a similarity.
        means: whether its columns are subtasks, whose gradients were averaged before the cosine (`influence_paper`).
        apart: whether a row's score does not depend on other rows, so that rows can be scored in blocks.

    """

    function: Callable[[Tensor, Tensor], Tensor]
    formula: str
    places: bool = False
    means: bool = False
    apart: bool = True


AGGREGATIONS: dict[str, Aggregation] = {
    "less": Aggregation(_less, "max over subtasks, mean over target rows z' of"),
    "paper": Aggregation(_paper, "max over subtasks; z' is the mean gradient of a subtask;", means=True),
    "mean": Aggregation(_mean, "mean over subtasks, mean over target rows z' of"),
    "max": Aggregation(_max, "max over target rows z' of"),
    "round_robin": Aggregation(
        _round_robin, "1 - place / n, where target rows z' in turn take the best row left by", places=True, apart=False
    ),
    "bids": Aggregation(
        _bids,
        "1 - place / n, where the least-served subtask takes its best row left by the normalised",
        places=True,
        apart=False,
    ),
}


class _Some(Sequence[str]):
    """Names of some rows, made only for a message."""

    def __init__(self, keys: Sequence[str] | None, rows: Tensor) -> None:
        self._keys, self._rows = keys, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = int(self._rows[index])
        return str(row) if self._keys is None else self._keys[row]


def aggregate(
    similarity: Float[Tensor, "n m"],
    groups: Sequence[int] | Int64[Tensor, " m"],
    how: str = "less",
    *,
    keys: Sequence[str] | None = None,
    eligible: Bool[Tensor, " n"] | None = None,
) -> Float32[Tensor, " n"]:
    """Compute one score per row from its similarity to many target rows.

    "less", "paper", "mean" and "max" score each row independently; "round_robin" and "bids" sort the rows and give
    scores 1, 1 - 1/n, ... in that order (distinct up to 2^24 rows).

    Args:
        similarity: floating dtype [n, m].
        groups: int64 [m], the subtask of each target row.
        how: a name of `AGGREGATIONS`.
        keys: [n], keys that break ties in an order, so that the order of the rows does not matter; without them the
            position decides.
        eligible: bool [n]; other rows are ignored and get nan.

    Returns:
        float32 [n].

    Raises:
        UsageError: if the name is unknown.
        DataError: if the similarity of eligible rows is not finite; the message names the rows.
        ValueError: if shapes do not match.

    Example:
        >>> similarity = torch.tensor([[0.2, 0.4, -0.5], [0.0, 0.0, 0.6]])  # two target rows of subtask 0, one of 1
        >>> [round(score, 2) for score in aggregate(similarity, [0, 0, 1]).tolist()]
        [0.3, 0.6]

    """
    if how not in AGGREGATIONS:
        raise UsageError(f"unknown aggregation '{how}'{did_you_mean(how, AGGREGATIONS)}")
    if similarity.ndim != 2 or not similarity.shape[1]:
        raise ValueError(f"aggregate needs a similarity [n, m] with m >= 1 target rows; got {list(similarity.shape)}")
    n = len(similarity)
    of = torch.as_tensor(groups, dtype=torch.int64)
    if of.shape != (similarity.shape[1],):
        raise ValueError(f"aggregate: {similarity.shape[1]} target rows but groups of shape {list(of.shape)}")
    if keys is not None and len(keys) != n:
        raise ValueError(f"aggregate: {n} rows but {len(keys)} keys")
    rows = torch.arange(n) if eligible is None else eligible.nonzero().flatten()
    if keys is not None:  # so that sums over rows do not depend on the order of the files either
        rows = torch.from_numpy(sorted_by(keys, rows.numpy()))
    scores = torch.full((n,), float("nan"))
    if AGGREGATIONS[how].apart and 4 * similarity.numel() > large.LARGE:
        names = _Some(keys, torch.arange(n))
        require_finite(similarity, names, f"aggregation '{how}'", where=eligible)
        for block in large.blocks(similarity):
            scores[block] = AGGREGATIONS[how].function(similarity[block], of)
        return scores if eligible is None else scores.masked_fill(~eligible, float("nan"))
    part = similarity if keys is None and eligible is None else large.taken(similarity, rows)
    require_finite(part, _Some(keys, rows), f"aggregation '{how}'")
    if len(rows):
        scores[rows] = AGGREGATIONS[how].function(part, of)
    return scores
