"""Validate a surrogate: compare its estimates with true retraining (spec B.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from datatools.stats import Numbers, bootstrap_interval, pearson, pearson_rows, quotient, spearman, spearman_rows


@dataclass(frozen=True)
class Judgement:
    """Comparison of estimated and true losses of the same R orders; intervals are 95 % bootstrap intervals over orders.

    An estimate of inf ranks as worst; pearson, mae, bias and conformal are then None.

    Attributes:
        orders: R.
        spearman: rank correlation.
        spearman_interval: its interval.
        pearson: correlation of the losses.
        pearson_interval: its interval.
        regret: true loss of the order with the best estimate, minus the best true loss.
        regret_random: expected regret of a random order.
        hit_rate: share of pairs of orders that are ranked correctly.
        hit_rate_interval: its interval.
        mae: mean absolute error of the losses.
        mae_relative: mae divided by that of always predicting the reference's loss (below 1: better than no estimate).
        bias: mean error.
        conformal: half-width of an interval around the estimate, corrected by its bias, that contains 90 % of new
            orders; None for fewer than 9 orders, where no such interval is finite.

    Example:
        >>> judge([1.0, 2.0], [1.0, 2.0], reference=1.5).orders
        2

    """

    orders: int
    spearman: float | None
    spearman_interval: tuple[float, float] | None
    pearson: float | None
    pearson_interval: tuple[float, float] | None
    regret: float
    regret_random: float
    hit_rate: float | None
    hit_rate_interval: tuple[float, float] | None
    mae: float | None
    mae_relative: float | None
    bias: float | None
    conformal: float | None

    def as_dict(self) -> dict[str, object]:
        """Convert to plain values for JSON.

        Returns:
            Name -> number, list or None.

        """
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def judge(estimated: Numbers, true: Numbers, *, reference: float, seed: int = 0) -> Judgement:
    """Compare estimates with the true losses of the same orders.

    Args:
        estimated: one estimate per order [R]; inf if the estimated run diverges.
        true: the losses after retraining [R].
        reference: the true loss of the reference order.
        seed: seed of the bootstrap.

    Returns:
        The comparison.

    Raises:
        ValueError: if lengths differ, there are fewer than two orders, or a true loss is not finite.

    Example:
        >>> found = judge([1.0, 2.0, 3.0, 5.0], [1.1, 2.2, 2.9, 4.0], reference=2.0)
        >>> found.spearman, found.hit_rate, found.regret
        (1.0, 1.0, 0.0)

    """
    e, t = np.asarray(estimated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if e.shape != t.shape or e.ndim != 1 or len(e) < 2:
        raise ValueError(f"judge: {e.shape} estimates and {t.shape} true losses; expected equal lengths of 2 or more")
    if not np.isfinite(t).all():
        raise ValueError(f"judge: a true loss is {t[~np.isfinite(t)][0]}; leave out orders that diverge")
    e = np.where(np.isfinite(e), e, np.inf)
    whole = bool(np.isfinite(e).all())
    error = e - t if whole else np.zeros_like(t)
    mae, none = float(np.abs(error).mean()), float(np.abs(reference - t).mean())
    centred = np.abs(error - error.mean())
    rank = math.ceil(0.9 * (len(t) + 1))
    return Judgement(
        orders=len(t),
        spearman=spearman(e, t),
        spearman_interval=bootstrap_interval(spearman_rows, e, t, seed=seed),
        pearson=pearson(e, t) if whole else None,
        pearson_interval=bootstrap_interval(pearson_rows, e, t, seed=seed) if whole else None,
        regret=float(t[int(np.argmin(e))] - t.min()),
        regret_random=float(t.mean() - t.min()),
        hit_rate=hit_rate(e, t),
        hit_rate_interval=bootstrap_interval(_hit_rate, e, t, seed=seed),
        mae=mae if whole else None,
        mae_relative=mae / none if whole and none > 0 else None,
        bias=float(error.mean()) if whole else None,
        conformal=float(np.sort(centred)[rank - 1]) if whole and rank <= len(t) else None,
    )


def hit_rate(a: Numbers, b: Numbers) -> float | None:
    """Compute the share of pairs that a and b rank alike, among pairs that differ in b; ties in a count half.

    Args:
        a: numbers [n].
        b: numbers [n].

    Returns:
        The share, or None if b has no pairs that differ.

    Example:
        >>> hit_rate([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
        0.6666666666666666

    """
    found = _hit_rate(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return float(found) if np.isfinite(found) else None


def _signs(values: NDArray[np.float64]) -> NDArray[np.int8]:
    """Return the sign of value i minus value j: [..., n] -> [..., n, n]."""
    i, j = values[..., :, None], values[..., None, :]
    return (i > j).astype(np.int8) - (i < j).astype(np.int8)


def _hit_rate(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    right = _signs(y)
    agree = (_signs(x) * right).sum((-2, -1), dtype=np.float64)
    count = (right != 0).sum((-2, -1), dtype=np.float64)
    return (quotient(agree, count) + 1) / 2


@dataclass(frozen=True)
class Prize:
    """Spread of the loss over orders compared with its spread over seeds of one order (spec B.5).

    Attributes:
        over_orders: standard deviation over orders.
        over_seeds: standard deviation over seeds; None if not measured, 0 if only the order is random.
        ratio: over_orders / over_seeds; None if over_seeds is None or 0.
        worth_it: whether the ratio is at least 2; None if unknown.

    Example:
        >>> prize([1.0, 2.0, 3.0], None).worth_it is None
        True

    """

    over_orders: float
    over_seeds: float | None
    ratio: float | None
    worth_it: bool | None

    def sentence(self) -> str:
        """Describe the result in one sentence.

        Returns:
            The sentence.

        """
        spread = f"losses differ by {self.over_orders:.3g} over orders (standard deviation)"
        if self.over_seeds is None:
            return f"{spread}; the difference over seeds was not measured (set seeds to 2 or more)"
        if self.ratio is None:
            return f"{spread}; nothing else in this run is random, so every difference is due to the order"
        verdict = "an order can matter" if self.worth_it else "less than twice, so there is little to gain by ordering"
        return f"{spread} and by {self.over_seeds:.3g} over seeds, {self.ratio:.1f} times as much; {verdict}"


def prize(orders: Numbers, seeds: Numbers | None) -> Prize:
    """Measure how much can be gained by ordering: compare the spread of the loss over orders with that over seeds.

    Args:
        orders: true losses of at least two orders.
        seeds: true losses of one order with at least two seeds; None if not measured.

    Returns:
        The comparison.

    Example:
        >>> prize([1.0, 2.0, 3.0], [2.0, 2.1]).worth_it
        True

    """
    a = float(np.std(orders, ddof=1))
    if seeds is None:
        return Prize(a, None, None, None)
    b = float(np.std(seeds, ddof=1))
    ratio = a / b if b > 0 else None
    return Prize(a, b, ratio, a > 0 and (ratio is None or ratio >= 2))


def calibrated(
    estimates: NDArray[np.float64], true: Numbers, rows: Sequence[int]
) -> tuple[NDArray[np.float64], list[float]]:
    """Combine the estimates of several surrogates by ridge regression on a few true losses.

    Features are standardized; the penalty (1) prevents a fit to few true runs from following their noise.

    Args:
        estimates: estimates of E surrogates for R orders, float64 [E, R].
        true: the true losses [R]; only those of `rows` are read.
        rows: the orders to fit to.

    Returns:
        The combined estimates, float64 [R], which are predictions outside `rows`; and the E weights.

    Example:
        >>> mixed, weights = calibrated(np.array([[1.0, 2.0, 3.0]]), [10.0, 20.0, 0.0], rows=[0, 1])
        >>> bool(mixed[2] > mixed[1] > mixed[0])
        True

    """
    x = np.asarray(estimates, dtype=np.float64).T
    y = np.asarray(true, dtype=np.float64)[list(rows)]
    mean, scale = x[list(rows)].mean(0), x[list(rows)].std(0)
    z = (x - mean) / np.where(scale > 0, scale, 1.0)
    fit = z[list(rows)]
    weights = np.linalg.solve(fit.T @ fit + np.eye(z.shape[1]), fit.T @ (y - y.mean()))
    mixed: NDArray[np.float64] = y.mean() + z @ weights
    return mixed, [float(w) for w in weights]


def break_even(precompute_gradients: float, steps: int, score_gradients: float = 0.0) -> float:
    """Compute the number of orders from which on an estimate is cheaper than retraining.

    Args:
        precompute_gradients: cost of making the estimate, in batch gradients.
        steps: cost of retraining once, in batch gradients.
        score_gradients: cost of a score, in batch gradients.

    Returns:
        The number of orders; inf if a score costs as much as retraining.

    Example:
        >>> break_even(320, 32), break_even(0, 32, 32)
        (10.0, inf)

    """
    saved = steps - score_gradients
    return precompute_gradients / saved if saved > 0 else math.inf
