"""How long, and at which learning rate, a model should be adapted to a target: by specificity on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from jaxtyping import Float
from torch import Tensor

from datatools.errors import DataError


def specificity(warm: Float[Tensor, " d"], held: Float[Tensor, " d"], generic: Float[Tensor, " d"]) -> float:
    """cos(warm, held) - cos(warm, generic): how much more an adaptation serves the target than anything else.

    All three are gradients of a mean loss at the adapted model; a cosine with a zero gradient is 0.

    Args:
        warm: [d], on the rows that the model was adapted to, any floating dtype.
        held: [d], on other rows of the target.
        generic: [d], on rows that have nothing to do with the target.

    Returns:
        A number from -2 to 2.

    Source:
        TACS, arXiv 2605.09404, the calibration of its reference path.

    Example:
        >>> import torch
        >>> specificity(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]))
        1.0

    """
    return _cosine(warm, held) - _cosine(warm, generic)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    lengths = float(a.norm() * b.norm())
    return round(float(a @ b) / lengths, 12) if lengths > 0 else 0.0  # the last bits must not break ties


def most_specific(cells: Mapping[tuple[int, float], Sequence[float]]) -> tuple[int, float]:
    """The depth and the learning rate of the highest mean specificity over folds.

    Ties are broken towards the smaller depth, then the lower learning rate.

    Args:
        cells: (depth, learning rate) -> the specificity in each fold.

    Returns:
        (depth, learning rate).

    Raises:
        DataError: There is no cell, or the specificity of one is not finite.

    Source:
        TACS, arXiv 2605.09404.

    Example:
        >>> most_specific({(2, 1e-5): [0.1, 0.3], (8, 1e-5): [0.2, 0.2], (8, 5e-5): [0.1, 0.1]})
        (2, 1e-05)

    """
    if not cells or not all(values and all(map(math.isfinite, values)) for values in cells.values()):
        raise DataError(f"most_specific: {len(cells)} cells, and not every one has finite values: {dict(cells)}")
    return min(cells, key=lambda cell: (-round(fmean(cells[cell]), 12), *cell))
