"""GREATS: rows that lower the loss on target rows most, with a second-order term for rows that repeat each other."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows


def greats(features: Float[Tensor, "n d"], k: int, wanted: Float[Tensor, " d"], *, rate: float) -> Selection:
    """Choose k rows greedily by the fall of the target loss in one step of gradient descent.

    With the Hessian of the target loss taken as the identity, the gain of row i after the rows S is rate <g_i, v> -
    rate^2 <g_i, sum_S g_j>, for the gradient v of the target loss. Later rows may have a negative gain: k rows are
    chosen all the same.

    Cost: O(n^2 d).

    Args:
        features: the gradients g, floating dtype [n, d].
        k: number of rows to choose.
        wanted: the mean gradient v of the target rows, floating dtype [d].
        rate: the learning rate.

    Returns:
        The rows in the order of the picks, with weights of 1. Ties go to the lower index.

    Raises:
        ValueError: unless 1 <= k <= n and the features are finite.

    Source:
        Wang et al. 2024, GREATS, NeurIPS 2024, and its code (`greedy_selection`).

    Differs:
        The code sums inner products over all layers (ghost products); here features are those of one matrix.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 1.0]])
        >>> greats(rows, 2, torch.tensor([1.0, 1.0]), rate=0.5).indices
        tensor([0, 2])

    """
    check_rows("greats", features, k)
    rows, aim = features.double().cpu(), wanted.double().cpu()
    gain = rows @ aim
    products = rows @ rows.T
    picks: list[int] = []
    for _ in range(k):
        picks.append(int(gain.argmax()))
        gain = gain - rate * products[picks[-1]]
        gain[picks] = -torch.inf
    return Selection(torch.tensor(picks))


def _choose(features: Tensor, k: int, *, wanted: Tensor, rate: float, **_: Any) -> Selection:
    return greats(features, k, wanted, rate=rate)


GREATS = CoresetMethod(
    name="greats",
    title="rows of each source that lower the loss on target rows most, and repeat each other least",
    choose=_choose,
    cost="O(n^2 d), and the gradient of the target rows",
    target=True,
)
