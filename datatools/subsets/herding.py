"""Rows whose mean approximates the mean of all rows: herding followed by exchanges."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows

IMPROVEMENT = 1e-9  # relative to the squared norm of the largest row: smaller gains of an exchange are rounding


def herding(
    features: Float[Tensor, "n d"],
    k: int,
    *,
    kept: Int64[Tensor, " kept"] | None = None,
    groups: Sequence[tuple[Tensor, int]] | None = None,
    exchanges: int | None = None,
) -> Selection:
    """Choose k rows S that make || mean_S - mean || small: a greedy pass, then exchanges of one row for another.

    The greedy pass adds the row that brings the sum of the chosen rows closest to the same multiple of the mean of all
    n rows (herding). Each exchange is the best of all possible ones; exchanges end when none is an improvement. Ties go
    to the lower index. All weights are 1.

    Cost: O(n^2 d) for the inner products, then O(n k), and O(n^2) per exchange; O(n^2) memory.

    Args:
        features: floating dtype [n, d], finite.
        k: number of rows to choose.
        kept: int64 [kept], rows that are always in S and count towards k; they come first.
        groups: (rows, int64; number of them to choose) of disjoint groups; rows are exchanged within their group.
            Together with `kept` the numbers add up to k. None is one group of all other rows.
        exchanges: largest number of exchanges; None is k.

    Returns:
        The rows in the order of the picks, with weights of 1.

    Raises:
        ValueError: unless 1 <= k <= n, the features are finite, and kept rows and quotas add up to k.

    Source:
        Herding, Welling 2009; mean of gradients as the objective, CRAIG, arXiv 1906.01827, and GradMatch, arXiv
        2103.00123.

    Example:
        >>> herding(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), k=1).indices.tolist()  # the mean is 3
        [2]

    """
    check_rows("herding", features, k)
    rows = features.double()
    centred = rows - rows.mean(0)
    n = len(centred)
    products = (centred @ centred.mT).cpu()  # [n, n]; on the CPU, because many small steps follow
    own = products.diagonal().clone()
    picks = [] if kept is None else kept.tolist()
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[picks] = True
    if groups is None:
        groups = [((~chosen).nonzero()[:, 0], k - len(picks))]
    if len(picks) + sum(quota for _, quota in groups) != k:
        raise ValueError(f"herding: {len(picks)} rows kept and quotas {[q for _, q in groups]} do not add up to k={k}")
    group = torch.full((n,), -1)
    for g, (rows, _) in enumerate(groups):
        group[rows.cpu()] = g
    left = torch.tensor([quota for _, quota in groups] + [0])  # the last entry is for rows without a group
    towards = products[chosen].sum(0)  # inner product of each row with the sum of the chosen ones
    fixed = len(picks)
    while len(picks) < k:
        length = (2 * towards + own).masked_fill(chosen | (left[group] == 0), torch.inf)  # growth of the squared sum
        picks.append(int(length.argmin()))
        chosen[picks[-1]] = True
        left[group[picks[-1]]] -= 1
        towards += products[picks[-1]]
    scale = float(own.max()) * IMPROVEMENT
    for _ in range(k if exchanges is None else exchanges):
        inside, outside = torch.tensor(picks[fixed:]), (~chosen & (group >= 0)).nonzero()[:, 0]
        if not len(outside) or not len(inside):
            break
        change = (
            2 * (towards[outside][None] - towards[inside][:, None])
            + own[outside][None]
            + own[inside][:, None]
            - 2 * products[inside][:, outside]
        ).masked_fill(group[inside][:, None] != group[outside][None], torch.inf)
        best = int(change.argmin())
        if float(change.flatten()[best]) >= -scale:
            break
        place, into = best // len(outside), int(outside[best % len(outside)])
        out, picks[fixed + place] = picks[fixed + place], into
        chosen[out], chosen[into] = False, True
        towards += products[into] - products[out]
    return Selection(torch.tensor(picks))


def _choose(features: Tensor, k: int, *, kept: Tensor, groups: Sequence[tuple[Tensor, int]], **_: Any) -> Selection:
    return herding(features, k, kept=kept, groups=groups)


HERDING = CoresetMethod(
    name="herding",
    title="rows whose mean gradient is closest to that of the large batch, with a quota for each source",
    choose=_choose,
    cost="O(n^2 d)",
    scope="batch",
)
"""Herding of all sources at once, with the same quotas.

Within a source of three rows of which one is kept, there are few choices; among all sources together, there are many.
"""
