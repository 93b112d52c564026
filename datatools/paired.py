"""Means over rows and seeds with bootstrap intervals, and paired comparisons of two arms on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

_LEVELS = [0.025, 0.975]
_NUMBERS = 1 << 22  # of a block of resamples


@dataclass(frozen=True)
class Paired:
    """The difference of two arms that saw the same rows, theirs minus ours.

    Attributes:
        difference: the mean difference.
        low: the lower end of its 95 % interval over rows and seeds.
        high: the upper end.
        p: the two-sided probability, by the bootstrap, of a difference at least as far from zero without an effect.
        sign_p: the two-sided p of the exact sign test over the rows whose values differ (of single runs with values 0
            and 1, McNemar's test).
        better: rows on which they are higher.
        worse: rows on which they are lower.

    Example:
        >>> found = compare(np.ones((1, 8)), np.zeros((1, 8)))
        >>> found.difference, found.low, found.high, found.worse
        (-1.0, -1.0, -1.0, 8)
    """

    difference: float
    low: float
    high: float
    p: float
    sign_p: float
    better: int
    worse: int


def bootstrap_mean(
    values: Float[np.ndarray, "seeds rows"],
    weights: Float[np.ndarray, " rows"] | None = None,
    *,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float, float]:
    """Return the mean over seeds and rows, with its 95 % percentile interval by resampling both.

    Args:
        values: float64 [s, n], one value per seed and row.
        weights: float64 [n], the weight of each row (tokens, for a loss); None weighs all alike.
        seed: of the resampling.
        draws: number of resamples.

    Returns:
        (mean, low, high).

    Raises:
        ValueError: There is no value.

    Example:
        >>> bootstrap_mean(np.ones((2, 5)))
        (1.0, 1.0, 1.0)
    """
    mean, drawn = _resampled(values, weights, seed, draws)
    low, high = np.quantile(drawn, _LEVELS)
    return mean, float(low), float(high)


def compare(
    ours: Float[np.ndarray, "seeds rows"],
    theirs: Float[np.ndarray, "others rows"],
    weights: Float[np.ndarray, " rows"] | None = None,
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Paired:
    """Compare two arms, row by row.

    Equal numbers of seeds are pairs, seed by seed; otherwise each arm's mean over its seeds is compared, and the
    interval is over rows alone.

    Args:
        ours: float64 [s, n].
        theirs: float64 [t, n], of the same rows.
        weights: float64 [n], as in `bootstrap_mean`.
        seed: of the resampling.
        draws: number of resamples.

    Returns:
        The difference, theirs minus ours, with its interval and the results of both tests.

    Raises:
        ValueError: There is no value, or the rows differ in number.

    Example:
        >>> found = compare(np.zeros((1, 8)), np.ones((1, 8)))
        >>> found.difference, found.better, found.sign_p
        (1.0, 8, 0.0078125)
    """
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"compare: {ours.shape[1]} rows of one arm and {theirs.shape[1]} of the other")
    if len(ours) != len(theirs):
        ours, theirs = ours.mean(0, keepdims=True), theirs.mean(0, keepdims=True)
    differences = theirs - ours
    mean, drawn = _resampled(differences, weights, seed, draws)
    low, high = np.quantile(drawn, _LEVELS)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    by_row = differences.mean(0)
    better, worse = int((by_row > 0).sum()), int((by_row < 0).sum())
    p = 1.0 if not differences.any() else min(1.0, 2 * (float(tail) + 1) / (draws + 1))
    return Paired(mean, float(low), float(high), p, sign_test(better, worse), better, worse)


def sign_test(better: int, worse: int) -> float:
    """Run the exact sign test: how likely so few or fewer rows on the rarer side are if both are equally likely.

    Args:
        better: number of rows on one side.
        worse: number of rows on the other side; rows without a difference count on neither.

    Returns:
        The two-sided p; 1.0 without a row.

    Example:
        >>> sign_test(8, 0), sign_test(3, 3), sign_test(0, 0)
        (0.0078125, 1.0, 1.0)
    """
    if better + worse == 0:
        return 1.0
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))


def _resampled(
    values: NDArray[np.float64], weights: NDArray[np.float64] | None, seed: int, draws: int
) -> tuple[float, NDArray[np.float64]]:
    """The weighted mean, and that of each resample of rows and seeds, float64 [draws].

    Few seeds vary less in resamples than they do: the deviation of each seed's mean is stretched by sqrt(s / (s - 1)).
    """
    s, n = values.shape
    if s == 0 or n == 0:
        raise ValueError(f"a mean over {s} seeds and {n} rows; at least one of each is needed")
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    by_seed = values @ w / w.sum()
    mean = float(by_seed.mean())
    if s > 1:
        values = values + ((s / (s - 1)) ** 0.5 - 1) * (by_seed - mean)[:, None]
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(s, np.full(s, 1 / s), size=draws) / s
    found = np.empty(draws)
    block = max(1, _NUMBERS // n)
    for start in range(0, draws, block):
        part = slice(start, min(start + block, draws))
        rows = generator.multinomial(n, np.full(n, 1 / n), size=part.stop - part.start) * w
        means = rows @ values.T / np.maximum(rows.sum(1), np.finfo(float).tiny)[:, None]
        found[part] = (seeds[part] * means).sum(1)
    return mean, found
