"""Target rows in groups, the subtasks, which are averaged one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor


def subtask_means(
    similarity: Float[Tensor, "n m"], groups: Sequence[int] | Int64[Tensor, " m"]
) -> Float32[Tensor, "n g"]:
    """The mean over the target rows of each subtask, which may be of unequal size.

    Args:
        similarity: [n, m], any floating dtype.
        groups: int64 [m], the subtask of each target row.

    Returns:
        float32 [n, g], subtasks ascending.

    >>> subtask_means(torch.tensor([[1.0, 3.0, 5.0]]), [0, 0, 1]).tolist()
    [[2.0, 5.0]]
    """
    return similarity.float() @ averaging(groups, similarity.shape[1]).T


def averaging(groups: Sequence[int] | Int64[Tensor, " m"], m: int) -> Float32[Tensor, "g m"]:
    """The matrix float32 [g, m] whose row j averages the columns of subtask j; groups is int64 [m].

    Raises:
        ValueError: for groups of another shape.
    """
    of = torch.as_tensor(groups, dtype=torch.int64)
    if of.shape != (m,):
        raise ValueError(f"groups names the subtask of each of {m} target rows; got {list(of.shape)}")
    member = (of == torch.tensor(sorted(set(of.tolist())), dtype=torch.int64)[:, None]).float()
    return member / member.sum(1, keepdim=True)
