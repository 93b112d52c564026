"""PartitionSel: weighted rows, under a budget for each source, whose gradient matches that of target rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows


def partition_sel(
    features: Float[Tensor, "n d"],
    k: int,
    wanted: Float[Tensor, " d"],
    *,
    kept: Int64[Tensor, " kept"],
    groups: Sequence[tuple[Tensor, int]],
) -> Selection:
    """Choose rows and weights w >= 0 that maximise <w, mu> - 1/2 w^T K w, at most a quota of each source.

    mu_i = <g_i, v> for the gradient v of the target rows, and K = G G^T, so that this is the non-negative combination
    of the rows' gradients that is closest to v. Orthogonal matching pursuit takes the row with the largest partial
    derivative among the sources with budget left, and solves for all weights again. A factor before K changes all
    weights alike, and they are scaled to a mean of 1.

    Cost: O(n^2 d), then k small least-squares problems.

    Args:
        features: the gradients g, floating dtype [n, d].
        k: number of rows to choose, those that are kept included.
        wanted: the mean gradient v of the target rows, floating dtype [d].
        kept: int64 [kept], rows that are always chosen; they come first, with weights as the others.
        groups: (rows, int64; number of them to choose) of disjoint groups.

    Returns:
        The rows in the order of the picks, with weights of mean 1; rows that the solution does not need have weight 0.
        All weights are 1 where no row's gradient has a positive product with v.

    Raises:
        ValueError: unless 1 <= k <= n, the features are finite, and kept rows and quotas add up to k.

    Source:
        PartitionSel 2026, arXiv 2606.07954, as public notes describe it.

    Differs:
        Quotas are met exactly, because a step trains on k rows; the paper's budgets are upper limits.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> groups = [(torch.tensor([0, 1]), 1), (torch.tensor([2]), 1)]
        >>> found = partition_sel(rows, 2, torch.tensor([4.0, 2.0]), kept=torch.zeros(0, dtype=int), groups=groups)
        >>> found.indices, found.weights
        (tensor([1, 2]), tensor([1., 1.]))

    """
    check_rows("partition_sel", features, k)
    rows, aim = features.double().cpu(), wanted.double().cpu()
    scale = rows.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
    rows = rows / scale
    # only inner products matter: work in the span of the rows, where the part of v outside it is lost to all alike
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rows, aim = left * values, right @ aim
    aim = aim / aim.norm().clamp_min(torch.finfo(torch.float64).tiny)
    picks = kept.tolist()
    budget = [quota for _, quota in groups]
    if len(picks) + sum(budget) != k:
        raise ValueError(f"partition_sel: {len(picks)} rows kept and quotas {budget} do not add up to k={k}")
    group = torch.full((len(rows),), -1)
    for g, (members, _) in enumerate(groups):
        group[members.cpu()] = g
    left_over = torch.tensor([*budget, 0])  # the last entry is for rows without a group
    weights = _solved(rows, picks, aim)
    while len(picks) < k:
        slope = rows @ (aim - weights @ rows[picks])
        slope = slope.masked_fill(left_over[group] == 0, -torch.inf)
        slope[picks] = -torch.inf
        picks.append(int(slope.argmax()))
        left_over[group[picks[-1]]] -= 1
        weights = _solved(rows, picks, aim)
    total = float(weights.sum())
    even = torch.ones(k, dtype=torch.float64)
    return Selection(torch.tensor(picks), weights=(weights * (k / total) if total > 0 else even).float())


def _solved(rows: Tensor, picks: Sequence[int], aim: Tensor) -> Tensor:
    """Return the weights w >= 0 of some rows whose combination is closest to `aim`."""
    from scipy.optimize import nnls

    if not picks:
        return torch.zeros(0, dtype=torch.float64)
    return torch.from_numpy(nnls(rows[list(picks)].T.numpy(), aim.numpy())[0])


def _choose(
    features: Tensor, k: int, *, wanted: Tensor, kept: Tensor, groups: Sequence[tuple[Tensor, int]], **_: Any
) -> Selection:
    return partition_sel(features, k, wanted, kept=kept, groups=groups)


PARTITION_SEL = CoresetMethod(
    name="partition_sel",
    title="weighted rows, with a quota for each source, whose gradient is closest to that of target rows",
    choose=_choose,
    cost="O(n^2 d), k least-squares problems, and the gradient of the target rows",
    scope="batch",
    weighted=True,
    target=True,
)
