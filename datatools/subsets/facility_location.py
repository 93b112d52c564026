"""Medoids by greedy facility location."""

import heapq
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from datatools.errors import UsageError, did_you_mean
from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod

METRICS = ("l1", "l2", "cosine")
"""Names of distances between features."""
LAZY_FROM = 512  # number of rows from which lazy greedy, with its heap, is faster than a pass over the matrix per pick


def facility_location(similarity: Float[Tensor, "n n"], k: int, *, lazy: bool | None = None) -> Selection:
    """Choose k rows S that greedily maximize F(S) = sum_i max_{j in S} similarity_ij.

    F of the empty set is sum_i min_j similarity_ij. Ties go to the lower index, and rows are picked even if they add
    nothing to F. F is within 1 - 1/e of the optimum (Nemhauser et al. 1978).

    Cost: O(k n^2) time, O(n^2) memory; lazy usually takes far less time.

    Args:
        similarity: floating dtype [n, n], symmetric and finite; computed in float64.
        k: number of rows to choose.
        lazy: recompute a gain only if its old value, which is an upper bound, could still win; picks are the same. None
            chooses the faster way for n.

    Returns:
        Indices in the order of the picks; weights are cluster sizes, where each row belongs to its most similar pick,
        and a pick to itself.

    Raises:
        ValueError: unless 1 <= k <= n and the matrix is square and finite.

    Example:
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
        gain = (matrix - covered).clamp_min(0).sum(1)  # symmetric: row j of the matrix is the coverage by pick j
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


def distances(features: Float[Tensor, "n d"], metric: str = "l1") -> Float64[Tensor, "n n"]:
    """Compute the distances between all pairs of rows.

    Args:
        features: floating dtype [n, d].
        metric: a name of `METRICS`; "cosine" is 1 - cosine.

    Returns:
        float64 [n, n], symmetric, zero on the diagonal.

    Raises:
        UsageError: if the metric is unknown.

    Example:
        >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "l2").tolist()
        [[0.0, 5.0], [5.0, 0.0]]

    """
    if metric not in METRICS:
        raise UsageError(f"coreset: unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
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
    title="medoids of the gradients of each source, as published",
    choose=_choose,
    cost="O(n^2 d + k n^2) per source",
    rule="adam",
    coordinates=True,
)
