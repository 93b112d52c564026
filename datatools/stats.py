"""Ranks, correlations, confidence intervals of a mean, and bootstrap intervals, computed by scipy. Imports no torch.

scipy is imported where it is used, so that commands that show no statistics do not load it.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[np.float64]
Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""float64 [..., n] and [..., n] -> float64 [...], nan where the statistic is undefined."""

_PAIRS = 1 << 21
"""Upper limit of pairs of values passed to a statistic at a time, because it may compare all values in pairs."""


def ranks(values: Numbers) -> NDArray[np.float64]:
    """Compute the ranks 1..n along the last axis; equal values share their mean rank.

    Args:
        values: numbers [..., n]; infinities have ranks.

    Returns:
        float64 [..., n].

    Example:
        >>> ranks([3.0, 1.0, 3.0]).tolist()
        [2.5, 1.0, 2.5]

    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(np.asarray(values, dtype=np.float64), axis=-1), dtype=np.float64)


def pearson(a: Numbers, b: Numbers) -> float | None:
    """Compute the linear correlation of two lists of numbers.

    Args:
        a: numbers [n].
        b: numbers [n].

    Returns:
        The correlation, in [-1, 1]; None if one of the lists does not vary or is not finite.

    Example:
        >>> round(pearson([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]), 3)
        0.982
        >>> pearson([1.0, 1.0], [1.0, 2.0]) is None
        True

    """
    found = pearson_rows(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return float(found) if np.isfinite(found) else None


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Compute the rank correlation of two lists of numbers; infinities have ranks, nan has none.

    Args:
        a: numbers [n].
        b: numbers [n].

    Returns:
        The correlation, in [-1, 1]; None if one of the lists does not vary or contains nan.

    Example:
        >>> spearman([1.0, 2.0, 4.0], [10.0, 20.0, 1e9])
        1.0

    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return None if np.isnan(x).any() or np.isnan(y).any() else pearson(ranks(x), ranks(y))


def pearson_rows(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the linear correlation of each row of `x` with the same row of `y`.

    Args:
        x: float64 [..., n].
        y: float64 [..., n].

    Returns:
        float64 [...]; nan where the correlation is undefined.

    Example:
        >>> pearson_rows(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[3.0, 4.0], [4.0, 3.0]])).round(6).tolist()
        [1.0, -1.0]

    """
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    return quotient((x * y).sum(-1), np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def spearman_rows(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the rank correlation of each row of `x` with the same row of `y`.

    Args:
        x: float64 [..., n].
        y: float64 [..., n].

    Returns:
        float64 [...]; nan where the correlation is undefined.

    Example:
        >>> spearman_rows(np.array([[1.0, 2.0, 9.0]]), np.array([[1.0, 5.0, 6.0]])).round(6).tolist()
        [1.0]

    """
    return pearson_rows(ranks(x), ranks(y))


def quotient(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide elementwise.

    Args:
        over: numerators, float64 [...].
        under: denominators, float64 [...].

    Returns:
        float64 [...]; nan where the denominator is not positive.

    Example:
        >>> quotient(np.array([1.0, 1.0]), np.array([2.0, 0.0])).tolist()
        [0.5, nan]

    """
    found: NDArray[np.float64] = np.where(under > 0, over / np.where(under > 0, under, 1.0), np.nan)
    return found


def bootstrap_interval(
    statistic: Statistic, a: NDArray[np.float64], b: NDArray[np.float64], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float] | None:
    """Compute the 95 % percentile interval of a statistic of pairs (a[i], b[i]) by resampling the pairs.

    Args:
        statistic: function of float64 [..., n] and [..., n].
        a: float64 [n].
        b: float64 [n].
        seed: seed of the resampling.
        draws: number of resamples.

    Returns:
        (low, high); None if the statistic is defined for fewer than half of the resamples.

    Example:
        >>> a = np.arange(9.0)
        >>> bootstrap_interval(pearson_rows, a, 2 * a)
        (1.0, 1.0)

    """
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for resamples in which the statistic is undefined; they are dropped below
        drawn = bootstrap(
            (a, b), lambda x, y, axis: statistic(x, y), paired=True, vectorized=True, n_resamples=draws,
            batch=max(1, _PAIRS // len(a) ** 2), method="percentile", random_state=np.random.default_rng(seed),
        )  # fmt: skip
    found = drawn.bootstrap_distribution[np.isfinite(drawn.bootstrap_distribution)]
    if 2 * len(found) < draws:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Compute a 95 % confidence interval of the mean by Student's t distribution.

    Args:
        values: measurements of the same quantity, such as one per seed.

    Returns:
        (mean, low, high); low and high are None for fewer than two values.

    Example:
        >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(low, 2), round(high, 2)
        (2.0, -0.48, 4.48)

    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None, None
    from scipy.special import stdtrit  # the quantile of t, without the half second of scipy.stats

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    t = float(stdtrit(n - 1, 0.975))
    return mean, mean - t * spread, mean + t * spread
