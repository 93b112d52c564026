"""Rows whose mean is near the mean of all: herding, and matching pursuit with weights."""

import torch
from torch import Tensor

from datatools.selection import Selection

IMPROVEMENT = 1e-9  # of the squared error of one row: an exchange that gains less is rounding


def herding(features: Tensor, k: int, *, exchanges: int | None = None) -> Selection:
    """k rows S that make || mean_S - mean || small: greedy by the running sum, then exchanges of one row for another.

    features: [n, d], finite. The greedy step adds the row that brings the sum of the chosen rows nearest to as many
    times the mean (herding); each exchange is the best of all k (n - k), and they end when none helps, or after
    `exchanges` of them (None: k). Ties go to the lower index. All weights are 1.
    Cost: O(n^2 d) for the inner products, then O(n k) and O(n^2) an exchange; O(n^2) memory.
    Source: herding, Welling 2009; mean of gradients as the aim, CRAIG, arXiv 1906.01827, and GradMatch, arXiv
    2103.00123.
    Raises: ValueError unless 1 <= k <= n and the features are finite.
    """
    centred = _centred("herding", features, k)
    products = centred @ centred.mT  # [n, n]
    own = products.diagonal().clone()
    chosen = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    towards = torch.zeros_like(own)  # inner product of each row with the sum of the chosen ones
    picks: list[int] = []
    for _ in range(k):
        length = (2 * towards + own).masked_fill(chosen, torch.inf)  # of the new sum, up to a constant
        picks.append(int(length.argmin()))
        chosen[picks[-1]] = True
        towards += products[picks[-1]]
    scale = float(own.max()) * IMPROVEMENT
    for _ in range(k if exchanges is None else exchanges):
        inside, outside = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
        if not len(outside):
            break
        change = (
            2 * (towards[outside][None] - towards[inside][:, None])
            + own[outside][None]
            + own[inside][:, None]
            - 2 * products[inside][:, outside]
        )
        best = int(change.argmin())
        if float(change.flatten()[best]) >= -scale:
            break
        out, into = int(inside[best // len(outside)]), int(outside[best % len(outside)])
        picks[picks.index(out)] = into
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
