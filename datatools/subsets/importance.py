"""Rows drawn with probabilities in proportion to the length of their features, and weights that undo it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.selection.candidates import Selection
from datatools.subsets.method import CoresetMethod
from datatools.subsets.rows import check_rows

FLOOR = 0.1
"""Smallest length that counts, relative to the mean length: no weight exceeds 1 / FLOOR by much."""


def importance(features: Float[Tensor, "n d"], k: int, *, generator: torch.Generator) -> Selection:
    """Draw k of n rows with inclusion probabilities pi_i proportional to |x_i|, and weights k / (n pi_i).

    Rows are drawn by systematic sampling of a random permutation, so that exactly k rows are drawn and pi_i is exact.
    Then sum_S w_i x_i / k is an unbiased estimate of the mean; with these probabilities its variance is the smallest of
    all independent draws. Lengths below a tenth of the mean count as a tenth.

    Cost: O(n d).

    Args:
        features: floating dtype [n, d], finite.
        k: number of rows to draw.
        generator: source of randomness.

    Returns:
        The rows in ascending order, with their weights; rows with pi_i = 1 are always drawn.

    Raises:
        ValueError: unless 1 <= k <= n and the features are finite.

    Source:
        Katharopoulos & Fleuret 2018, Not All Samples Are Created Equal, arXiv 1803.00942. Systematic sampling: Madow
        1949.

    Differs:
        The paper draws with replacement; here no row is drawn twice.

    Example:
        >>> found = importance(torch.tensor([[1.0], [1.0], [2.0]]), 2, generator=torch.Generator().manual_seed(0))
        >>> 2 in found.indices.tolist(), round(float(found.weights[-1]), 3)
        (True, 0.667)

    """
    check_rows("importance", features, k)
    chances = inclusion(features.double().norm(dim=1).cpu(), k)
    order = torch.randperm(len(chances), generator=generator)
    ends = chances[order].cumsum(0)
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    marks = start + torch.arange(k, dtype=torch.float64)
    places = torch.searchsorted(ends, marks.clamp_max(float(ends[-1]) * (1 - 1e-12)), right=True)
    picks = order[places.clamp_max(len(order) - 1)].sort().values
    return Selection(picks, weights=(k / (len(chances) * chances[picks])).float())


def inclusion(lengths: Float[Tensor, " n"], k: int) -> Float[Tensor, " n"]:
    """Return probabilities proportional to lengths, at most 1, that add up to k.

    Args:
        lengths: floating dtype [n], not negative.
        k: their sum, between 1 and n.

    Returns:
        float64 [n].

    Example:
        >>> inclusion(torch.tensor([1.0, 1.0, 8.0]), 2)
        tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)

    """
    sizes = lengths.double().clamp_min(FLOOR * float(lengths.double().mean()))
    if not bool(sizes.any()):
        sizes = torch.ones_like(sizes)
    sure = torch.zeros(len(sizes), dtype=torch.bool)
    while True:  # rows that would be drawn more than once are drawn surely, and the others share the rest
        left = k - int(sure.sum())
        free = sizes[~sure]
        chances = torch.ones_like(sizes)
        chances[~sure] = left * free / free.sum()
        over = (chances > 1) & ~sure
        if not bool(over.any()):
            return chances
        sure |= over


def _choose(features: Tensor, k: int, *, generator: torch.Generator, **_: Any) -> Selection:
    return importance(features, k, generator=generator)


IMPORTANCE = CoresetMethod(
    name="importance",
    title="rows of each source drawn in proportion to the length of their gradients, with weights that undo it",
    choose=_choose,
    cost="O(n d)",
    weighted=True,
)
