"""LESS from top to bottom: stores of gradient features at some checkpoints -> one score per row.

score(z) = max over subtasks of the mean over target rows z' of sum_c w_c cos(update_c(z), gradient_c(z'))

Source: LESS, Xia et al. 2024, arXiv 2402.04333.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datatools.features.store import GradientFeatures
from datatools.less.aggregate import AGGREGATIONS, aggregate
from datatools.less.influence import influence, influence_paper


@dataclass(frozen=True, eq=False)
class LessScores:
    """What LESS knows about each of n rows.

    Attributes:
        scores: float32 [n], higher is better; NaN for a row whose update was not finite or zero.
        similarity: float32 [n, m], the weighted mean cosine with each target row; NaN for the same rows.
        norms: float32 [n], the weighted mean norm of the updates.
        status: position -> "empty" or "nonfinite", of the rows without a score.
    """

    scores: Tensor
    similarity: Tensor
    norms: Tensor
    status: dict[int, str]


def less_scores(
    train: Sequence[GradientFeatures],
    target: Sequence[GradientFeatures],
    weights: Sequence[float],
    groups: Tensor,
    *,
    keys: Sequence[str],
    target_keys: Sequence[str],
    how: str = "less",
) -> LessScores:
    """Score the rows `keys` by their influence on the rows `target_keys`, store by store and block by block.

    Args:
        train: one store per checkpoint, of the optimizer's updates (projected).
        target: one store per checkpoint, of the target's gradients (projected in the same way), all of them finite.
        weights: the mean learning rate of each checkpoint.
        groups: int64 [m], the subtask of each target row.
        keys: [n], the rows to score; a key may come several times, as copies of a row do.
        target_keys: [m], the target rows.
        how: how target rows become one score, a name of `AGGREGATIONS`.

    Raises:
        UsageError: for an unknown aggregation, or weights that do not add up to a positive number.
        DataError: for rows that are missing in a store, or target rows that have no gradient.
    """
    # 1. What the stores say about the rows: an update that is zero or not finite at one checkpoint takes the row out.
    norms = torch.zeros(len(keys))
    status: dict[int, str] = {}
    for updates, weight in zip(train, weights, strict=True):
        rows = updates.rows()
        place = {key: i for i, key in enumerate(rows.keys)}
        at = [place[key] for key in keys]
        norms += weight * rows.norms[torch.tensor(at)]
        status |= {i: rows.status[row] for i, row in enumerate(at) if rows.status[row] != "ok"}
    good = torch.ones(len(keys), dtype=torch.bool)
    good[list(status)] = False

    # 2. The similarity of each row to each target row: the weighted mean of the cosines over checkpoints.
    wanted = []
    for gradients in target:
        held = gradients.rows()
        length = dict(zip(held.keys, held.norms, strict=True))
        norm = torch.stack([length[key] for key in target_keys])
        wanted.append([(target_keys, gradients.take(target_keys), norm, ["ok"] * len(target_keys))])
    similarity = influence(train, wanted, weights, keys=keys)

    # 3. One score per row. As in the paper, the gradients of a subtask may be averaged before the cosine instead.
    columns, of = similarity, groups
    if how in AGGREGATIONS and AGGREGATIONS[how].means:
        columns = influence_paper(train, wanted, weights, groups, keys=keys)
        of = torch.arange(columns.shape[1])
    scores = aggregate(columns, of, how, keys=keys, eligible=good)
    similarity[~good] = float("nan")
    return LessScores(scores, similarity, norms, status)
