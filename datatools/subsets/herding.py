"""Rows whose mean is near the mean of all: herding, and matching pursuit with weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datatools.selection.candidates import Selection

IMPROVEMENT = 1e-9  # of the squared error of one row: an exchange that gains less is rounding


def herding(
    features: Tensor,
    k: int,
    *,
    kept: Tensor | None = None,
    groups: Sequence[tuple[Tensor, int]] | None = None,
    exchanges: int | None = None,
) -> Selection:
    """k rows S that make || mean_S - mean || small: greedy by the running sum, then exchanges of one row for another.

    features: [n, d], finite. The greedy step adds the row that brings the sum of the chosen rows nearest to as many
    times the mean of all n rows (herding); each exchange is the best of all, and they end when none helps, or after
    `exchanges` of them (None: k). Ties go to the lower index. All weights are 1.
    kept: rows that are in S whatever happens, counted by k; they come first.
    groups: (rows, how many of them to choose), apart from each other; a row is exchanged within its group. Together
    with `kept` they add up to k. None is one group of all other rows.
    Cost: O(n^2 d) for the inner products, then O(n k) and O(n^2) an exchange; O(n^2) memory.
    Source: herding, Welling 2009; mean of gradients as the aim, CRAIG, arXiv 1906.01827, and GradMatch, arXiv
    2103.00123.
    Raises: ValueError unless 1 <= k <= n, the features are finite, and kept rows and quotas add up to k.
    """
    centred = _centred("herding", features, k)
    n = len(centred)
    products = (centred @ centred.mT).cpu()  # [n, n]; the many small steps that follow are slow on a GPU
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
    left = torch.tensor([quota for _, quota in groups] + [0])  # the last is for rows of no group
    towards = products[chosen].sum(0)  # inner product of each row with the sum of the chosen ones
    fixed = len(picks)
    while len(picks) < k:
        length = (2 * towards + own).masked_fill(chosen | (left[group] == 0), torch.inf)  # of the new sum, relative
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


def matching_pursuit(features: Tensor, k: int) -> Selection:
    """k rows with weights w >= 0 that make || sum_S w_i x_i / k - mean || small: orthogonal matching pursuit.

    features: [n, d], finite. Each step takes the row with the largest inner product with what is left of the mean, and
    solves for all weights anew (non-negative least squares). Rows that the solution does not need have weight 0.
    Cost: O(n^2 d), then k small least-squares problems.
    Source: GradMatch, arXiv 2103.00123, algorithm 2; without its ridge term, the weights being bounded by w >= 0.
    Raises: ValueError unless 1 <= k <= n and the features are finite.
    """
    from scipy.optimize import nnls

    _centred("matching_pursuit", features, k)
    rows = features.double().cpu()
    scale = rows.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
    rows = rows / scale
    mean = rows.mean(0)
    # least squares only sees inner products: work in the span of the rows, at most n dimensions
    if rows.shape[1] > len(rows):
        left, values, _ = torch.linalg.svd(rows, full_matrices=False)
        rows = left * values
        mean = rows.mean(0)
    picks: list[int] = []
    weights = torch.zeros(0, dtype=torch.float64)
    rest = mean
    for _ in range(k):
        fit = rows @ rest
        fit[picks] = -torch.inf
        picks.append(int(fit.argmax()))
        solution, _ = nnls(rows[picks].T.numpy(), mean.numpy())
        weights = torch.from_numpy(solution)
        rest = mean - weights @ rows[picks]
    return Selection(torch.tensor(picks), weights=(weights * k).float())


def _centred(who: str, features: Tensor, k: int) -> Tensor:
    """The rows less their mean, float64, after the checks that both share."""
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"{who}: features {list(features.shape)} must be finite, [n, d]")
    if not 1 <= k <= len(features):
        raise ValueError(f"{who}: k={k} of n={len(features)} rows; k must be between 1 and {len(features)}")
    rows = features.double()
    return rows - rows.mean(0)
