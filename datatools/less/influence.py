"""The influence of each row on each target row, computed from gradient features at several checkpoints.

Source: LESS, Xia et al. 2024, arXiv 2402.04333. Where its paper and its code differ, the names say which is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from datatools import large
from datatools.errors import DataError, UsageError
from datatools.features.keys import Places
from datatools.features.store import GradientFeatures
from datatools.less.common import ROUNDING, without
from datatools.selection.candidates import require_finite
from datatools.selection.subtasks import averaging

Block = tuple[Sequence[str], Tensor, Tensor, Sequence[str]]
"""(keys [b], features [b, d], norms [b], status [b]): what `GradientFeatures.iter_blocks` yields."""
Features = GradientFeatures | Tensor | Iterable[Block]


def influence(
    train: Sequence[Features],
    target: Sequence[Features],
    weights: Sequence[float] | Float[Tensor, " c"],
    *,
    keys: Sequence[str] | None = None,
    remove: Sequence[Float[Tensor, "k d"] | None] | None = None,
) -> Float32[Tensor, "n m"]:
    """Compute similarity = sum_c w_c cos(train_c, target_c) over checkpoints c, with w = weights / sum(weights).

    Rows of `train` whose status is not "ok", or that are zero, get zeros: exclude them from `eligible` later.

    Cost: n m d multiply-adds per checkpoint.
    Memory: n m floats and one block.

    Args:
        train: one entry per checkpoint: a store, a tensor [n, d] of any floating dtype and row norms, or blocks.
        target: the same for the target rows; tensors are [m, d].
        weights: the mean learning rate of each checkpoint c.
        keys: the rows to compute, in this order (keys may repeat, as copies of a row do); other rows of `train` are
            skipped. By default the rows of the first checkpoint in their order, which other checkpoints must match.
        remove: one entry per checkpoint: orthonormal directions [k, d] that are projected out of both sides before the
            cosine (see `common_directions`), or None.

    Returns:
        float32 [n, m].

    Raises:
        DataError: if rows are missing or not finite, or zero in `target`.
        UsageError: if weights do not add up to a positive number.
        ValueError: if the numbers of checkpoints differ.

    Example:
        >>> rows, wanted = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0]])
        >>> influence([rows], [wanted], weights=[1e-4]).tolist()
        [[1.0], [0.0]]

    """
    if not len(train) == len(target) == len(weights) or not len(train):
        raise ValueError(
            f"influence: {len(train)} train features, {len(target)} target features and {len(weights)} "
            "weights; there must be one of each for every checkpoint"
        )
    w = torch.as_tensor(weights, dtype=torch.float64)
    if not w.isfinite().all() or (w < 0).any() or w.sum() <= 0:
        raise UsageError(
            f"influence: checkpoint weights {w.tolist()} must be mean learning rates, at least 0 and not all 0"
        )
    w = w / w.sum()
    similarity: Tensor | None = None
    places = None if keys is None else Places(keys)
    for c, (train_c, target_c) in enumerate(zip(train, target, strict=True)):
        gone = None if remove is None else remove[c]
        wanted = _target(target_c, gone)
        if places is None:
            blocks = list(_scored(train_c, wanted, gone))  # the first checkpoint determines the rows
            keys = [key for block_keys, _ in blocks for key in block_keys]
            places = Places(keys)
            cosines: Iterable[tuple[Sequence[str], Tensor]] = blocks
        else:
            cosines = _scored(train_c, wanted, gone)
        assert keys is not None
        if similarity is None:
            similarity = large.table(len(keys), len(wanted))
        elif similarity.shape[1] != len(wanted):
            raise DataError(
                f"influence: checkpoint {c} has {len(wanted)} target rows, the first "
                f"{similarity.shape[1]}; extract the features of the same target at every checkpoint"
            )
        seen = torch.zeros(len(keys), dtype=torch.bool)
        for block_keys, cosine in cosines:
            source, place = places.find(block_keys)
            if len(source):
                similarity[place] += w[c].float() * cosine[source]
                seen[place] = True
                large.release(similarity)
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
    weights: Sequence[float] | Float[Tensor, " c"],
    groups: Sequence[int] | Int64[Tensor, " m"],
    *,
    keys: Sequence[str] | None = None,
    remove: Sequence[Float[Tensor, "k d"] | None] | None = None,
) -> Float32[Tensor, "n g"]:
    """Compute similarity = sum_c w_c cos(train_c, mean over the subtask of the raw gradients target_c).

    As in the paper, the target's gradients are averaged before the cosine, so that gradients with a large norm count
    more. Columns are the subtasks in ascending order; `aggregate(..., how="paper")` takes their maximum.

    Args:
        train: as for `influence`.
        target: stores, blocks, or tensors [m, d] of raw gradients (not normalized).
        weights: as for `influence`.
        groups: int64 [m], the subtask of each target row.
        keys: as for `influence`.
        remove: as for `influence`.

    Returns:
        float32 [n, g].

    Raises:
        DataError: as for `influence`.
        UsageError: as for `influence`.

    Example:
        >>> rows, wanted = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
        >>> influence_paper([rows], [wanted], weights=[1e-4], groups=[0, 0]).tolist()
        [[1.0], [0.0]]

    """
    return influence(train, [subtask_targets(*_raw(t), groups) for t in target], weights, keys=keys, remove=remove)


def subtask_targets(
    features: Float[Tensor, "m d"],
    norms: Float32[Tensor, " m"] | None,
    groups: Sequence[int] | Int64[Tensor, " m"],
) -> Float32[Tensor, "g d"]:
    """Compute the mean gradient of each subtask.

    Args:
        features: floating dtype [m, d], unit rows.
        norms: float32 [m], norms of the gradients; None averages unit gradients, so that target rows count equally.
        groups: int64 [m], the subtask of each row.

    Returns:
        float32 [g, d], subtasks ascending.

    Example:
        >>> subtask_targets(torch.eye(2), torch.tensor([3.0, 1.0]), [0, 0]).tolist()
        [[1.5, 0.5]]

    """
    raw = features.float() if norms is None else features.float() * norms[:, None]
    return averaging(groups, len(raw)) @ raw


def _target(features: Features, remove: Tensor | None) -> Tensor:
    """Read the target features as unit rows [m, d] without `remove`, all of which must be nonzero."""
    found = list(_blocks(features))
    unit = [_unit(block[0], block[1], "target features", remove) for block in found]
    rows = torch.cat(unit) if unit else torch.zeros(0, 0)
    if not len(rows):
        raise DataError("influence: there are no target rows; pass at least one")
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


def _scored(features: Features, target: Tensor, remove: Tensor | None) -> Iterator[tuple[Sequence[str], Tensor]]:
    """Yield (keys [b], cosines [b, m]) block by block."""
    for keys, rows, _, status in _blocks(features):
        if rows.shape[1] != target.shape[1]:
            raise DataError(
                f"features of train (dim {rows.shape[1]}) and target (dim {target.shape[1]}) were "
                "projected differently; extract one of them again"
            )
        if isinstance(features, GradientFeatures):  # whose rows are unit rows, or zeros if they are not "ok"
            unit = rows if remove is None else _rest(rows, remove)
        else:
            bad = torch.tensor([state != "ok" for state in status], dtype=torch.bool)
            unit = _unit(keys, rows.masked_fill(bad[:, None], 0.0), "train features", remove)
        yield keys, unit @ target.T


_CACHED = 16 << 20  # bytes of float32 rows that stay in a processor's cache between decoding and product


def _blocks(features: Features) -> Iterator[Block]:
    if isinstance(features, GradientFeatures):
        yield from features.iter_blocks(min(4096, max(32, _CACHED // (4 * features.dim))))
    elif isinstance(features, Tensor):
        n = len(features)
        yield [str(i) for i in range(n)], features, features.norm(dim=1), ["ok"] * n
    else:
        yield from features


def _unit(keys: Sequence[str], rows: Tensor, what: str, remove: Tensor | None) -> Tensor:
    """Scale rows to length 1. What is left of a row within the removed directions is rounding, and becomes zero."""
    rows = rows.float()
    require_finite(rows, keys, what)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / torch.where(length > 0, length, 1.0)
    return unit if remove is None else _rest(unit, remove)


def _rest(unit: Tensor, remove: Tensor) -> Tensor:
    """Return unit rows without their part in the removed directions, as unit rows or zeros."""
    rest = without(unit, remove)
    length = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    return torch.where(length > ROUNDING, rest / length, 0.0)
