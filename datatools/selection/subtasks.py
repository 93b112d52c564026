"""Averages over subtasks, which are groups of target rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor


def subtask_means(
    similarity: Float[Tensor, "n m"], groups: Sequence[int] | Int64[Tensor, " m"]
) -> Float32[Tensor, "n g"]:
    """Average over the target rows of each subtask; subtasks may have different sizes.

    Args:
        similarity: floating dtype [n, m].
        groups: int64 [m], the subtask of each target row.

    Returns:
        float32 [n, g], subtasks ascending.

    Raises:
        ValueError: if `groups` has another shape.

    Example:
        >>> subtask_means(torch.tensor([[1.0, 3.0, 5.0]]), [0, 0, 1]).tolist()
        [[2.0, 5.0]]

    """
    return similarity.float() @ averaging(groups, similarity.shape[1]).T


def averaging(groups: Sequence[int] | Int64[Tensor, " m"], m: int) -> Float32[Tensor, "g m"]:
    """Build the matrix whose row j averages the columns of subtask j.

    Args:
        groups: int64 [m], the subtask of each target row.
        m: number of target rows.

    Returns:
        float32 [g, m], subtasks ascending.

    Raises:
        ValueError: if `groups` has another shape.

    Example:
        >>> averaging([0, 0, 1], 3).tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]

    """
    of = torch.as_tensor(groups, dtype=torch.int64)
    if of.shape != (m,):
        raise ValueError(f"groups must give the subtask of each of {m} target rows; got shape {list(of.shape)}")
    member = (of == torch.tensor(sorted(set(of.tolist())), dtype=torch.int64)[:, None]).float()
    return member / member.sum(1, keepdim=True)
