"""Correlations of two lists of numbers, or of many pairs of lists at once. Imports no torch."""

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
