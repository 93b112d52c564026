"""How well influences predict retrainings, and which settings no other beats in cost and value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools.stats import ranks


def datamodelling(influences: NDArray[Any], inside: NDArray[np.bool_], losses: NDArray[Any]) -> NDArray[np.float64]:
    """The rank correlation of predicted and true falls of the loss over subsets, for each target row.

    Args:
        influences: [pool, target].
        inside: Whether a row of the pool is in a subset [subsets, pool].
        losses: After training on a subset [subsets, target].
    """
    return correlations(inside.astype(np.float64) @ influences, -losses)


def correlations(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """The rank correlation of each column of two arrays [n, columns]."""
    x, y = (ranks(some.T) - (len(some) + 1) / 2 for some in (a, b))
    length = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.asarray((x * y).sum(1) / np.where(length > 0, length, 1.0))


def interval(
    influences: NDArray[Any], inside: NDArray[np.bool_], losses: NDArray[Any], draws: int = 200
) -> list[float]:
    """The 95 % interval of the mean score over resampled subsets and target rows."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        some, targets = (
            draw.integers(len(inside), size=len(inside)),
            draw.integers(losses.shape[1], size=losses.shape[1]),
        )
        found.append(datamodelling(influences[:, targets], inside[some], losses[some][:, targets]).mean())
    return [float(x) for x in np.quantile(found, (0.025, 0.975))]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of points (cost, value) to which no other point is equal or better in both and better in one."""
    return [
        i
        for i, (cost, value) in enumerate(points)
        if not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)
    ]
