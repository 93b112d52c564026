"""OPUS: rows drawn by how far the optimizer's update for them goes in the direction of target rows."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows

TEMPERATURE = 0.5
"""Temperature of the draw, in standard deviations of the utilities of the rows."""


def opus(
    features: Float[Tensor, "n d"],
    k: int,
    wanted: Float[Tensor, " d"],
    *,
    rate: float,
    temperature: float = TEMPERATURE,
    generator: torch.Generator,
) -> Selection:
    """Draw k rows one after the other, each with a probability proportional to exp(utility / temperature).

    The utility of row i after the rows S is <u_i, v> - rate <u_i, sum_S u_j>: u_i is the update that the optimizer
    makes for the row's gradient, v the gradient of the target rows, and the second term is for rows that repeat each
    other. The temperature is in standard deviations of <u_i, v>; at 0, the best row is taken.

    Cost: O(n^2 d).

    Args:
        features: the updates u, floating dtype [n, d].
        k: number of rows to draw.
        wanted: the mean gradient v of the target rows, floating dtype [d].
        rate: the learning rate.
        temperature: as above.
        generator: source of randomness.

    Returns:
        The rows in the order of the draws, with weights of 1.

    Raises:
        ValueError: unless 1 <= k <= n and the features are finite.

    Source:
        Wang et al. 2026, OPUS, arXiv 2602.05400.

    Differs:
        The paper sketches all layers by CountSketch; here updates are those of one matrix, under an AdamW state of its
        own (`coreset.rule: adam`), and the temperature does not depend on the scale of the utilities.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 1.0]])
        >>> opus(rows, 2, torch.ones(2), rate=0.5, temperature=0, generator=torch.Generator()).indices
        tensor([0, 2])

    """
    check_rows("opus", features, k)
    rows, aim = features.double().cpu(), wanted.double().cpu()
    utility = rows @ aim
    products = rows @ rows.T
    heat = temperature * float(utility.std(correction=0))
    picks: list[int] = []
    for _ in range(k):
        if heat > 0:
            chances = torch.softmax(utility / heat, 0)
            picks.append(int(torch.multinomial(chances, 1, generator=generator)))
        else:
            picks.append(int(utility.argmax()))
        utility = utility - rate * products[picks[-1]]
        utility[picks] = -torch.inf
    return Selection(torch.tensor(picks))


def _choose(
    features: Tensor, k: int, *, wanted: Tensor, rate: float, generator: torch.Generator, **_: Any
) -> Selection:
    return opus(features, k, wanted, rate=rate, generator=generator)


OPUS = CoresetMethod(
    name="opus",
    title="rows of each source drawn by how well the optimizer's update for them serves target rows",
    choose=_choose,
    cost="O(n^2 d), and the gradient of the target rows",
    rule="adam",
    target=True,
)
