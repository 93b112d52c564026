"""Weighted rows whose mean approximates the mean of all rows: orthogonal matching pursuit."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows


def matching_pursuit(features: Float[Tensor, "n d"], k: int) -> Selection:
    """Choose k rows with weights w >= 0 that make || sum_S w_i x_i / k - mean || small by orthogonal matching pursuit.

    Each step takes the row with the largest inner product with the residual of the mean, and recomputes all weights by
    non-negative least squares. Rows that the solution does not need have weight 0.

    Cost: O(n^2 d), then k small least-squares problems.

    Args:
        features: floating dtype [n, d], finite.
        k: number of rows to choose.

    Returns:
        The rows in the order of the picks, with their weights.

    Raises:
        ValueError: unless 1 <= k <= n and the features are finite.

    Source:
        GradMatch, arXiv 2103.00123, algorithm 2; without its ridge term, because w >= 0 bounds the weights.

    Example:
        >>> found = matching_pursuit(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.1]]), k=2)
        >>> sorted(found.indices.tolist())
        [0, 1]

    """
    from scipy.optimize import nnls

    check_rows("matching_pursuit", features, k)
    rows = features.double().cpu()
    scale = rows.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
    rows = rows / scale
    mean = rows.mean(0)
    # least squares depends on inner products only: work in the span of the rows, with at most n dimensions
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


def _choose(features: Tensor, k: int, **_: Any) -> Selection:
    return matching_pursuit(features, k)


MATCHING_PURSUIT = CoresetMethod(
    name="matching_pursuit",
    title="weighted rows whose mean gradient is closest to that of all rows of their source",
    choose=_choose,
    cost="O(n^2 d) and k least-squares problems per source",
    weighted=True,
)
