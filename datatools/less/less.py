"""LESS from top to bottom: stores of gradient features at some checkpoints -> one score per row.

score(z) = max over subtasks of the mean over target rows z' of sum_c w_c cos(update_c(z), gradient_c(z'))

Source: LESS, Xia et al. 2024, arXiv 2402.04333.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from datatools import large
from datatools.errors import DataError
from datatools.features.keys import Places
from datatools.features.store import GradientFeatures
from datatools.less.aggregate import AGGREGATIONS, aggregate
from datatools.less.common import common_directions
from datatools.less.influence import influence, influence_paper


@dataclass(frozen=True, eq=False)
class LessScores:
    """The result of LESS for n rows.

    Attributes:
        scores: float32 [n], higher is better; nan for a row whose update was zero or not finite.
        similarity: float32 [n, m], the weighted mean cosine with each target row; nan for the same rows.
        norms: float32 [n], the weighted mean norm of the updates.
        status: position -> "empty" or "nonfinite", for the rows without a score.

    Example:
        >>> found = LessScores(torch.ones(1), torch.ones(1, 2), torch.ones(1), status={})
        >>> found.scores
        tensor([1.])

    """

    scores: Float32[Tensor, " n"]
    similarity: Float32[Tensor, "n m"]
    norms: Float32[Tensor, " n"]
    status: dict[int, str]


def less_scores(
    train: Sequence[GradientFeatures],
    target: Sequence[GradientFeatures],
    weights: Sequence[float],
    groups: Int64[Tensor, " m"],
    *,
    keys: Sequence[str],
    target_keys: Sequence[str],
    how: str = "less",
    advantages: Float32[Tensor, " m"] | None = None,
    common: int | None = None,
    sample: Sequence[str] = (),
) -> LessScores:
    """Score the rows `keys` by their influence on the rows `target_keys`, store by store and block by block.

    Args:
        train: one store per checkpoint, with the projected updates of the optimizer.
        target: one store per checkpoint, with the target's gradients (projected in the same way), all finite.
        weights: the mean learning rate of each checkpoint.
        groups: int64 [m], the subtask of each target row.
        keys: [n], the rows to score; keys may repeat, as copies of a row do.
        target_keys: [m], the target rows.
        how: aggregation over target rows, a name of `AGGREGATIONS`.
        advantages: float32 [m], what each target row counts, of either sign; None is 1 for all. The similarity to a row
            is multiplied by it, and so is the gradient that is averaged before the cosine.
        common: the number of common directions of the updates, besides their mean, that are removed before the cosine
            (see `common_directions`); None removes nothing, as in the paper.
        sample: the rows whose updates show the common directions, a random sample of the pool.

    Returns:
        Scores, similarities, norms and statuses.

    Raises:
        UsageError: if the aggregation is unknown, or weights do not add up to a positive number.
        DataError: if rows are missing in a store, or target rows have no gradient.

    Example:
        >>> import tempfile
        >>> from datatools import GradientFeatures, files, less_scores
        >>> keys = [files.digest(text) for text in (b"x", b"y", b"z")]
        >>> store = GradientFeatures.create_or_open(tempfile.mkdtemp(), meta={}, dim=2, keys=keys)
        >>> store.write_unit(0, torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
        >>> less_scores([store], [store], [1e-4], torch.tensor([0]), keys=keys[:2], target_keys=keys[2:]).scores
        tensor([1., 0.])

    """
    # 1. Norms and statuses from the stores: a row whose update is zero or not finite at a checkpoint gets no score.
    norms = torch.zeros(len(keys))
    status: dict[int, str] = {}
    for updates, weight in zip(train, weights, strict=True):
        rows = updates.rows()
        at = torch.full((len(keys),), -1)
        source, place = Places(keys).find(rows.keys)
        at[place] = source
        if (at < 0).any():
            missing = (at < 0).nonzero().flatten()
            raise DataError(
                f"{updates.folder}: holds no features of {len(missing)} rows (the first: {keys[int(missing[0])]})"
            )
        norms += weight * rows.norms[at]
        wrong = torch.tensor([state != "ok" for state in rows.status], dtype=torch.bool)
        status |= {i: rows.status[int(at[i])] for i in wrong[at].nonzero().flatten().tolist()}
    good = torch.ones(len(keys), dtype=torch.bool)
    good[list(status)] = False

    # 2. The similarity of each row to each target row: the weighted mean of the cosines over checkpoints.
    wanted = []
    for gradients in target:
        held = gradients.rows()
        length = dict(zip(held.keys, held.norms.tolist(), strict=True))
        norm = torch.tensor([length[key] for key in target_keys])
        if advantages is not None:
            norm = norm * advantages
        wanted.append([(target_keys, gradients.take(target_keys), norm, ["ok"] * len(target_keys))])
    remove = None if common is None else [common_directions(updates.take(sample), common) for updates in train]
    similarity = influence(train, wanted, weights, keys=keys, remove=remove)
    if advantages is not None:
        for block in large.blocks(similarity):  # a large one is in a file, and a product would be in memory
            similarity[block] *= advantages

    # 3. One score per row. Alternatively, as in the paper, the gradients of a subtask are averaged before the cosine.
    columns, of = similarity, groups
    if how in AGGREGATIONS and AGGREGATIONS[how].means:
        columns = influence_paper(train, wanted, weights, groups, keys=keys, remove=remove)
        of = torch.arange(columns.shape[1])
    scores = aggregate(columns, of, how, keys=keys, eligible=good)
    if not good.all():
        similarity[~good] = float("nan")
    return LessScores(scores, similarity, norms, status)
