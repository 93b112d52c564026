"""From features to one score a row: influence on each target row, and how many target rows become one number.

Source: LESS, Xia et al. 2024, arXiv 2402.04333; the names below say where its paper and its code part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import DataError, UsageError, did_you_mean
from datatools.features.store import GradientFeatures
from datatools.selection.candidates import require_finite

Block = tuple[Sequence[str], Tensor, Tensor, Sequence[str]]
"""(keys [b], features [b, d], norms [b], status [b]): what `GradientFeatures.iter_blocks` yields."""
Features = GradientFeatures | Tensor | Iterable[Block]


# ---------------------------------------------------------------- influence


def influence(
    train: Sequence[Features],
    target: Sequence[Features],
    weights: Sequence[float] | Tensor,
    *,
    keys: Sequence[str] | None = None,
) -> Tensor:
    """similarity float32 [n, m] = sum_c w_c cos(train_c, target_c), w = weights / sum(weights), over checkpoints c.

    train, target: one entry a checkpoint: a store, a tensor [n, d] or [m, d] of any row lengths, or blocks of them.
    weights: the mean learning rate of each checkpoint.
    keys: which rows are wanted, in which order (a key may come several times, as copies of a row do); other rows of
    `train` are passed over. Without it, the rows of the first checkpoint in their order, which the others must match.
    Rows of `train` whose status is not "ok", or that are zero, get zeros: leave them out of `eligible` later.
    Memory: n m floats and one block. Cost: n m d multiply-adds a checkpoint.
    Raises: DataError for rows that are missing, not finite, or zero in `target`; UsageError for weights that do not
    add up to something positive.
    """
    if not len(train) == len(target) == len(weights) or not len(train):
        raise ValueError(
            f"influence: {len(train)} train features, {len(target)} target features and {len(weights)} "
            "weights; there must be one of each for every checkpoint"
        )
    w = torch.as_tensor(weights, dtype=torch.float64)
    if not w.isfinite().all() or (w < 0).any() or w.sum() <= 0:
        raise UsageError(
            f"influence: checkpoint weights {w.tolist()}; they are mean learning rates, at least 0 and not all 0"
        )
    w = w / w.sum()
    similarity: Tensor | None = None
    places = None if keys is None else _places(keys)
    for c, (train_c, target_c) in enumerate(zip(train, target, strict=True)):
        wanted = _target(target_c)
        if places is None:
            blocks = list(_scored(train_c, wanted))  # the first checkpoint says which rows there are
            keys = [key for block_keys, _ in blocks for key in block_keys]
            places = _places(keys)
            cosines: Iterable[tuple[Sequence[str], Tensor]] = blocks
        else:
            cosines = _scored(train_c, wanted)
        assert keys is not None
        if similarity is None:
            similarity = torch.zeros(len(keys), len(wanted))
        elif similarity.shape[1] != len(wanted):
            raise DataError(
                f"influence: checkpoint {c} has {len(wanted)} target rows, the first "
                f"{similarity.shape[1]}; extract the features of the same target at every checkpoint"
            )
        seen = torch.zeros(len(keys), dtype=torch.bool)
        for block_keys, cosine in cosines:
            pairs = [(i, place) for i, key in enumerate(block_keys) for place in places.get(key, ())]
            if pairs:
                source, place = torch.tensor(pairs).unbind(1)
                similarity[place] += w[c].float() * cosine[source]
                seen[place] = True
        if not seen.all():
            missing = (~seen).nonzero().flatten().tolist()
            raise DataError(
                f"influence: checkpoint {c} lacks features of {len(missing)} rows (the first: "
                f"{keys[missing[0]]}); run the extraction again"
            )
    assert similarity is not None
    return similarity


def influence_paper(
    train: Sequence[Features],
    target: Sequence[Features],
    weights: Sequence[float] | Tensor,
    groups: Sequence[int] | Tensor,
    *,
    keys: Sequence[str] | None = None,
) -> Tensor:
    """similarity float32 [n, g] = sum_c w_c cos(train_c, mean over the subtask of the raw gradients target_c).

    As in the paper: the target's gradients are averaged before the cosine, so that one with a large norm counts more.
    Columns are the subtasks in ascending order; `aggregate(..., how="paper")` takes their maximum.
    target: stores, blocks, or tensors [m, d] of gradients as they are (not normalised). Else as `influence`.
    """
    return influence(train, [subtask_targets(*_raw(t), groups) for t in target], weights, keys=keys)


def subtask_targets(features: Tensor, norms: Tensor | None, groups: Sequence[int] | Tensor) -> Tensor:
    """The mean gradient of each subtask: features [m, d] (unit rows), norms [m], groups [m] -> [g, d], ascending.

    Without `norms` the mean of unit gradients: each target row has one vote.
    """
    raw = features.float() if norms is None else features.float() * norms[:, None]
    return _averaging(groups, len(raw)) @ raw


def _target(features: Features) -> Tensor:
    """Unit rows [m, d]; every one must be there."""
    found = list(_blocks(features))
    rows = torch.cat([_unit(block[0], block[1], "target features") for block in found]) if found else torch.zeros(0, 0)
    if not len(rows):
        raise DataError("influence: there are no target rows; give at least one")
    zero = (rows == 0).all(1).nonzero().flatten().tolist()
    if zero:
        keys = [key for block in found for key in block[0]]
        raise DataError(
            f"influence: {len(zero)} target rows have no gradient (the first: {keys[zero[0]]}); remove "
            "them from the target, or give them an answer"
        )
    return rows


def _raw(features: Features) -> tuple[Tensor, Tensor | None]:
    if isinstance(features, Tensor):
        return features, None
    blocks = list(_blocks(features))
    return torch.cat([block[1] for block in blocks]), torch.cat([block[2] for block in blocks])


def _scored(features: Features, target: Tensor) -> Iterator[tuple[Sequence[str], Tensor]]:
    """(keys [b], cosines [b, m]) block by block."""
    for keys, rows, _, status in _blocks(features):
        if rows.shape[1] != target.shape[1]:
            raise DataError(
                f"features of train (dim {rows.shape[1]}) and target (dim {target.shape[1]}) were "
                "projected differently; extract one of them again"
            )
        bad = torch.tensor([state != "ok" for state in status], dtype=torch.bool)
        yield keys, _unit(keys, rows.masked_fill(bad[:, None], 0.0), "train features") @ target.T


def _blocks(features: Features) -> Iterator[Block]:
    if isinstance(features, GradientFeatures):
        yield from features.iter_blocks()
    elif isinstance(features, Tensor):
        n = len(features)
        yield [str(i) for i in range(n)], features, features.norm(dim=1), ["ok"] * n
    else:
        yield from features


def _unit(keys: Sequence[str], rows: Tensor, what: str) -> Tensor:
    rows = rows.float()
    require_finite(rows, keys, what)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


def _places(keys: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


# ---------------------------------------------------------------- aggregation


def subtask_means(similarity: Tensor, groups: Sequence[int] | Tensor) -> Tensor:
    """[n, m] -> [n, g]: the mean over the target rows of each subtask, subtasks ascending, of unequal sizes too."""
    return similarity.float() @ _averaging(groups, similarity.shape[1]).T


def _averaging(groups: Sequence[int] | Tensor, m: int) -> Tensor:
    """[g, m], row j averages the columns of subtask j."""
    of = torch.as_tensor(groups, dtype=torch.int64)
    if of.shape != (m,):
        raise ValueError(f"groups names the subtask of each of {m} target rows; got {list(of.shape)}")
    member = (of == torch.tensor(sorted(set(of.tolist())), dtype=torch.int64)[:, None]).float()
    return member / member.sum(1, keepdim=True)


def _less(similarity: Tensor, groups: Tensor) -> Tensor:
    """Mean over the rows of a subtask, then the best subtask: what LESS's code does."""
    return subtask_means(similarity, groups).amax(1)


def _paper(similarity: Tensor, groups: Tensor) -> Tensor:
    """The best subtask, whose gradients were averaged before the cosine (`influence_paper`): what LESS's paper says."""
    if len(set(groups.tolist())) != len(groups):
        raise UsageError(
            "aggregation 'paper' averages the target's gradients before the cosine: give it the "
            "similarity of influence_paper, one column a subtask; or use 'less'"
        )
    return similarity.float().amax(1)


def _mean(similarity: Tensor, groups: Tensor) -> Tensor:
    """Mean over the rows of a subtask, then over subtasks: each subtask has one vote."""
    return subtask_means(similarity, groups).mean(1)


def _max(similarity: Tensor, groups: Tensor) -> Tensor:
    """The best single target row."""
    return similarity.float().amax(1)


def _round_robin(similarity: Tensor, groups: Tensor) -> Tensor:
    """Target rows in turn each take the best row that is left; the score falls with the place in that order.

    Cost: O(m n log n) time, n m integers. Source: arXiv 2602.14696 finds it the best at small budgets.
    """
    values = similarity.float().numpy()
    queues = [_Queue(values[:, j]) for j in range(values.shape[1])]
    used = np.zeros(len(values), dtype=bool)
    order = np.empty(len(values), dtype=np.int64)
    for place in range(len(values)):
        order[place] = queues[place % len(queues)].take(used)
    return _falling(order)


def _bids(similarity: Tensor, groups: Tensor) -> Tensor:
    """The least-served subtask takes its best row, again and again; the score falls with the place in that order.

    z_ij = (s_ij - mean_i s_ij) / std_i s_ij for each target row j (0 where all rows are alike), Z_ig its mean over the
    rows j of subtask g. Served is u = sum of Z_i over the rows taken, at first 0; each step takes, for the subtask
    g = argmin u (the first of equals), the row left with the highest Z_ig, and adds its whole row Z_i to u.
    Cost: O(g n log n + n g). Source: BIDS, arXiv 2501.12147: normalise for each target instance, then choose the row
    with the highest influence on the most underrepresented task. Differs: the update of u is written from that sentence
    of its abstract, not from its code.
    """
    values = similarity.double()
    spread = values.std(0, correction=0)
    flat = spread <= 1e-12 * values.abs().amax(0)  # rounding leaves a constant column a spread of about 1e-17
    z = torch.where(flat, 0.0, (values - values.mean(0)) / torch.where(flat, 1.0, spread))
    means = subtask_means(z, groups).numpy()
    queues = [_Queue(means[:, g]) for g in range(means.shape[1])]
    served = np.zeros(means.shape[1])
    used = np.zeros(len(means), dtype=bool)
    order = np.empty(len(means), dtype=np.int64)
    for place in range(len(means)):
        order[place] = row = queues[int(served.argmin())].take(used)
        served += means[row]
    return _falling(order)


class _Queue:
    """The rows by falling value, ties by position."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._order = np.argsort(-values, kind="stable").astype(np.int32)
        self._next = 0

    def take(self, used: NDArray[np.bool_]) -> int:
        """The first row that is not `used`, which becomes so. One must be left."""
        look = 16
        while True:
            free = ~used[self._order[self._next : self._next + look]]
            step = int(free.argmax())
            if free[step]:
                self._next += step
                row = int(self._order[self._next])
                used[row] = True
                return row
            self._next += len(free)
            look *= 2


def _falling(order: NDArray[np.int64]) -> Tensor:
    """The score of each row: 1 for the first of `order`, in equal steps down to 1 / n for the last."""
    n = len(order)
    scores = np.empty(n, dtype=np.float32)
    scores[order] = 1 - np.arange(n) / n
    return torch.from_numpy(scores)


Aggregation = Callable[[Tensor, Tensor], Tensor]
"""(similarity [n, m] with rows sorted so that the earlier wins a tie, groups [m]) -> scores float32 [n], n >= 1."""
AGGREGATIONS: Mapping[str, Aggregation] = {
    "less": _less,
    "paper": _paper,
    "mean": _mean,
    "max": _max,
    "round_robin": _round_robin,
    "bids": _bids,
}


def aggregate(
    similarity: Tensor,
    groups: Sequence[int] | Tensor,
    how: str = "less",
    *,
    keys: Sequence[str] | None = None,
    eligible: Tensor | None = None,
) -> Tensor:
    """similarity [n, m] and the subtask of each target row, groups [m] -> one score a row, float32 [n].

    how: a name of `AGGREGATIONS`. "less", "paper", "mean" and "max" score each row by itself; "round_robin" and "bids"
    put the rows in an order and give 1, 1 - 1/n, ... down that order (distinct up to 2^24 rows).
    keys: [n], break ties in those two, so that the order of the rows does not matter; without it the position does.
    eligible: bool [n]; other rows take no part and get NaN.
    Raises: UsageError for an unknown name, DataError that names eligible rows with a similarity that is not finite.
    """
    if how not in AGGREGATIONS:
        raise UsageError(f"there is no aggregation '{how}'{did_you_mean(how, AGGREGATIONS)}")
    if similarity.ndim != 2 or not similarity.shape[1]:
        raise ValueError(f"aggregate takes a similarity [n, m] with m >= 1 target rows; got {list(similarity.shape)}")
    n = len(similarity)
    of = torch.as_tensor(groups, dtype=torch.int64)
    if of.shape != (similarity.shape[1],):
        raise ValueError(f"aggregate: {similarity.shape[1]} target rows but groups of shape {list(of.shape)}")
    if keys is not None and len(keys) != n:
        raise ValueError(f"aggregate: {n} rows but {len(keys)} keys")
    rows = torch.arange(n) if eligible is None else eligible.nonzero().flatten()
    if keys is not None:  # sums over rows, too, are then made in an order that is not the files'
        rows = torch.tensor(sorted(rows.tolist(), key=keys.__getitem__), dtype=torch.int64)
    part = similarity if keys is None and eligible is None else similarity[rows]
    require_finite(part, [keys[i] if keys else str(i) for i in rows.tolist()], f"aggregation '{how}'")
    scores = torch.full((n,), float("nan"))
    if len(rows):
        scores[rows] = AGGREGATIONS[how](part, of)
    return scores
