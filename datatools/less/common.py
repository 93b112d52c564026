"""Directions that all rows share, and features without them.

Gradients of different rows have much in common: the format of the answers, the length of an answer, what the warm-up
has not finished learning. Rows that carry much of it are similar to every target row, whatever that is about (they are
hubs), and come first for every target. Without these directions a cosine compares what is particular to the rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from datatools.errors import UsageError

ROUNDING = 1e-3
"""A unit row of float16 features whose remainder is shorter than this consists of rounding errors."""


def common_directions(rows: Float[Tensor, "n d"], count: int) -> Float32[Tensor, "k d"]:
    """Compute the mean of a sample of unit features, and its main directions around the mean.

    The result is an orthonormal basis of span(mu, v_1, ..., v_count), where mu is the mean of the rows and v_i are the
    right singular vectors of rows - mu. Cost: O(n^2 d) time, through the Gram matrix.

    Args:
        rows: floating dtype [n, d], features of a random sample; rows of zeros are ignored.
        count: the number of directions besides the mean; at most n - 2 and d / 4 are taken.

    Returns:
        float32 [k, d], orthonormal, k at most count + 1; [0, d] without rows.

    Raises:
        UsageError: if the count is negative.

    Source:
        Mu and Viswanath 2018 (arXiv 1702.01417) remove the mean and the top components of word vectors. Differs: the
        features are those of gradients, and the directions come from a sample.

    Example:
        >>> common_directions(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), 0).tolist()
        [[1.0, 0.0, 0.0]]

    """
    if count < 0:
        raise UsageError(f"common_directions: {count} directions; give 0 or more")
    rows = rows.double()
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = (rows / torch.where(length > 0, length, 1.0))[length[:, 0] > 0]
    if not len(rows):
        return torch.zeros(0, rows.shape[1])
    mean = rows.mean(0, keepdim=True)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    there = int((values > 1e-9 * values[-1].clamp_min(1e-30)).sum())
    last = max(0, min(count, len(rows) - 2, rows.shape[1] // 4, there))
    main = vectors[:, len(rows) - last :].flip(1).T @ centred
    basis: list[Tensor] = []
    for direction in (mean[0], *main):
        rest = direction / torch.linalg.vector_norm(direction).clamp_min(1e-30)
        for _ in range(2):  # twice, because once leaves rounding errors along the earlier directions
            for earlier in basis:
                rest = rest - (rest @ earlier) * earlier
        if (size := torch.linalg.vector_norm(rest)) > 1e-6:
            basis.append(rest / size)
    return torch.stack(basis).float() if basis else torch.zeros(0, rows.shape[1])


def without(rows: Float[Tensor, "n d"], directions: Float[Tensor, "k d"]) -> Float[Tensor, "n d"]:
    """Remove from rows their part in the span of `directions` B: rows - (rows B^T) B.

    Args:
        rows: floating dtype [n, d].
        directions: floating dtype [k, d], orthonormal.

    Returns:
        [n, d], of the dtype of `rows`.

    Example:
        >>> without(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).tolist()
        [[0.0, 4.0]]

    """
    directions = directions.to(rows.dtype)
    return rows - (rows @ directions.T) @ directions
