"""Medoids by greedy facility location."""

import heapq
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.errors import UsageError, did_you_mean
from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod

METRICS = ("l1", "l2", "cosine")
"""Distances of features."""
LAZY_FROM = 512  # rows from which lazy greedy is faster: below, a pass over the matrix per pick costs less than a heap


def facility_location(similarity: Float[Tensor, "n n"], k: int, *, lazy: bool | None = None) -> Selection:
    """The k rows S that greedily maximise F(S) = sum_i max_{j in S} similarity_ij, F of nothing being sum_i min_j.

    Ties go to the lower index, and picks that gain nothing are made all the same. F is within 1 - 1/e of the best
    set's (Nemhauser et al. 1978).

    Cost: O(k n^2) time, O(n^2) memory; lazy usually far less.

    Args:
        similarity: [n, n], symmetric, finite, any floating dtype; computed in float64.
        k: how many rows to choose.
        lazy: recompute gains only where an old one, which is an upper bound, could still win; the picks are the same.
            None takes what is faster for n.

    Returns:
        Indices in the order of the picks; weights are cluster sizes: every row votes for the most similar pick, a pick
        for itself.

    Raises:
        ValueError: unless 1 <= k <= n and the matrix is square and finite.

    >>> similarity = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> found = facility_location(similarity, k=2)
    >>> found.indices.tolist(), found.weights.tolist()
    ([0, 2], [2.0, 1.0])
    """
    n = len(similarity)
    if similarity.shape != (n, n) or not similarity.isfinite().all():
        raise ValueError(f"facility_location: similarity {list(similarity.shape)} must be a square of finite numbers")
    if not 1 <= k <= n:
        raise ValueError(f"facility_location: k={k} medoids of n={n} rows; k must be between 1 and {n}")
    matrix = similarity.double().contiguous()
    picks = (_lazy if (n >= LAZY_FROM if lazy is None else lazy) else _batched)(matrix, k)
    votes = matrix[:, picks].argmax(1)
    votes[picks] = torch.arange(k, device=votes.device)
    return Selection(torch.tensor(picks), weights=torch.bincount(votes, minlength=k).float().cpu())


def _batched(matrix: Tensor, k: int) -> list[int]:
    covered = matrix.amin(1)
    picks: list[int] = []
    for _ in range(k):
        gain = (matrix - covered).clamp_min(0).sum(1)  # symmetric: row j of the matrix is what pick j covers
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
        covered = torch.maximum(covered, matrix[picks[-1]])
    return picks


def _lazy(matrix: Tensor, k: int) -> list[int]:
    covered = matrix.amin(1)
    gains = (matrix - covered).clamp_min(0).sum(1).tolist()
    heap = [(-gain, j, 0) for j, gain in enumerate(gains)]  # (-gain, row, picks when it was computed)
    heapq.heapify(heap)
    picks: list[int] = []
    while len(picks) < k:
        _, j, when = heapq.heappop(heap)
        if when == len(picks):
            picks.append(j)
            covered = torch.maximum(covered, matrix[j])
        else:
            heapq.heappush(heap, (-float((matrix[j] - covered).clamp_min(0).sum()), j, len(picks)))
    return picks


def distances(features: Tensor, metric: str = "l1") -> Tensor:
    """The distances of all pairs of rows.

    Args:
        features: Float [n, d].
        metric: A name of `METRICS`; "cosine" is 1 - cosine.

    Returns:
        Float64 [n, n], symmetric, zero on the diagonal.

    Raises:
        UsageError: For an unknown metric.

    Example:
        >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "l2").tolist()
        [[0.0, 5.0], [5.0, 0.0]]
    """
    if metric not in METRICS:
        raise UsageError(f"coreset: no metric is called {metric!r}{did_you_mean(metric, METRICS)}")
    rows = features.double()
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=1)
        found = 1 - rows @ rows.mT
    else:
        found = torch.cdist(rows, rows, p=1.0 if metric == "l1" else 2.0)
    found = (found + found.mT) / 2
    return found.fill_diagonal_(0).clamp_min(0)


def _choose(features: Tensor, k: int, *, metric: str, **_: Any) -> Selection:
    apart = distances(features, metric)
    return Selection(facility_location(apart.max() - apart, k).indices)


FACILITY_LOCATION = CoresetMethod(
    name="facility_location",
    title="medoids of the gradients of their source, as published",
    choose=_choose,
    cost="O(n^2 d + k n^2) per source",
    rule="adam",
    coordinates=True,
)
