"""Correlations of two lists of numbers, or of many pairs of lists at once; intervals of a mean. Imports no torch."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[np.float64]


def ranks(values: Numbers) -> NDArray[np.float64]:
    """[..., n] -> 1..n along the last axis, equal values sharing their mean rank."""
    v = np.asarray(values, dtype=np.float64)
    order = v.argsort(-1)
    ordered, at = np.take_along_axis(v, order, -1), np.arange(v.shape[-1])
    fresh = np.concatenate([np.full((*v.shape[:-1], 1), True), ordered[..., 1:] != ordered[..., :-1]], -1)
    closed = np.concatenate([fresh[..., 1:], np.full((*v.shape[:-1], 1), True)], -1)
    first = np.maximum.accumulate(np.where(fresh, at, 0), -1)
    last = np.minimum.accumulate(np.where(closed, at, v.shape[-1])[..., ::-1], -1)[..., ::-1]
    mean = np.empty_like(v)
    np.put_along_axis(mean, order, (first + last) / 2 + 1, -1)
    return mean


def pearson(a: Numbers, b: Numbers) -> float | None:
    """Linear correlation; None where one of them does not vary, or is not finite."""
    found = pearson_rows(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return float(found) if np.isfinite(found) else None


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Rank correlation, likewise; infinities have ranks, nan has none."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return None if np.isnan(x).any() or np.isnan(y).any() else pearson(ranks(x), ranks(y))


def pearson_rows(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., n] and [..., n] -> [...], nan where it does not exist."""
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    return quotient((x * y).sum(-1), np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def spearman_rows(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., n] and [..., n] -> [...], nan where it does not exist."""
    return pearson_rows(ranks(x), ranks(y))


def quotient(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    """nan where there is nothing to divide by."""
    found: NDArray[np.float64] = np.where(under > 0, over / np.where(under > 0, under, 1.0), np.nan)
    return found


# two-sided 95 % points of Student's t by degrees of freedom, 1 to 10
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t95(freedom: int) -> float:
    """The two-sided 95 % point; beyond the table by the expansion of Abramowitz & Stegun 26.7.5, to three digits."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def t_interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """A 95 % interval of the mean, by Student's t distribution.

    Args:
        values: Measurements of the same quantity, such as one per seed.

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
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    t = _t95(n - 1)
    return mean, mean - t * spread, mean + t * spread
