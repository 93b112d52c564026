"""UDS: rows whose logits have a large nuclear norm and lie far from those of recent rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows

ALPHA = 1.0
"""Weight of the diversity of a row against its utility."""
MEMORY = 1024


def uds(features: Float[Tensor, "n d"], k: int, memory: Float[Tensor, "m d"], *, alpha: float = ALPHA) -> Selection:
    """Choose the k rows with the largest utility + alpha x diversity.

    The utility of a row is the nuclear norm of its logits, the first number of its features. Its diversity is the mean
    distance of the other numbers, a projection of the logits, to those of the rows in `memory`; 0 without any.

    Cost: O(n m d).

    Args:
        features: floating dtype [n, 1 + d], of the kind "logits".
        k: number of rows to choose.
        memory: floating dtype [m, 1 + d], the features of rows that were chosen lately.
        alpha: weight of the diversity.

    Returns:
        The rows, best first, with weights of 1.

    Raises:
        ValueError: unless 1 <= k <= n and the features are finite.

    Source:
        Zou et al. 2025, arXiv 2510.16882, and its code (memory of 1,024 rows).

    Differs:
        The code multiplies by alpha = 0.0025 the distances of projections that are sqrt(T V) / 2 times as long as here
        for T positions and V words, thus by about 11 for a vocabulary of 151,936; its value belongs to that model. Here
        projections have the length of the logits themselves, and alpha is 1.

    Example:
        >>> features = torch.tensor([[3.0, 0.0], [2.0, 5.0], [1.0, 0.0]])
        >>> uds(features, 1, torch.zeros(0, 2)).indices, uds(features, 1, torch.zeros(1, 2)).indices
        (tensor([0]), tensor([1]))

    """
    check_rows("uds", features, k)
    rows = features.double().cpu()
    score = rows[:, 0].clone()
    if len(memory):
        score += alpha * torch.cdist(rows[:, 1:], memory[:, 1:].double().cpu()).mean(1)
    return Selection(score.argsort(descending=True, stable=True)[:k])


def _choose(features: Tensor, k: int, *, memory: Tensor, **_: Any) -> Selection:
    return uds(features, k, memory)


UDS = CoresetMethod(
    name="uds",
    title="rows of each source whose logits have a large nuclear norm and differ from those of recent rows",
    choose=_choose,
    cost="O(n m d) for m remembered rows",
    reads="logits",
    memory=MEMORY,
)
