"""Better orders by a judge that is too expensive for `search`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from datatools.order.search import Found, mutated, offspring, places

_ROUND = 8  # orders that a costly judge is given at once, and parents of the next
_CHILDREN = 512  # of which it is given the most promising
_FITTED = 512  # judged orders that say which are


def refine(
    judge: Callable[[list[tuple[int, ...]]], Sequence[float]],
    known: Mapping[tuple[int, ...], float],
    reference: Sequence[int],
    *,
    budget: int = 64,
    seed: int = 0,
) -> Found:
    """Better orders than the `known` ones, by a judge too expensive for `search`: the new ones only, best first.

    A quarter of the budget are random orders, so that the known ones' common errors do not decide; then, in rounds of
    8, of many children of the 8 best (`offspring`) those that `promise` most. Each order once. Scores that are not
    finite are inf, and no parents.

    Args:
        judge: orders -> their scores, lower is better; called with at most 8.
        known: orders whose scores are known.
        reference: what the orders are permutations of.
        budget: the most orders to judge.
        seed: of the orders that are proposed.

    Example:
        >>> def judge(orders):
        ...     return [abs(order[0] - 2) for order in orders]
        >>> refine(judge, {(0, 1, 2): 2.0}, reference=(0, 1, 2), budget=4).scores[0]
        0.0
    """
    rng, labels = np.random.default_rng(seed), np.asarray(reference, dtype=np.int64)
    scores = {tuple(map(int, sequence)): float(value) for sequence, value in known.items()}
    found: dict[tuple[int, ...], float] = {}
    tries = 0  # a handful of batches has few orders
    while len(found) < budget and tries < 50:
        best = sorted((s for s in scores if np.isfinite(scores[s])), key=lambda s: (scores[s], s))[:_FITTED]
        first = budget // 4 - len(found)
        count = min(_ROUND, first if first > 0 else budget - len(found))
        if first > 0 or len(best) < 2:
            made = rng.permuted(np.tile(np.arange(len(labels)), (count, 1)), axis=1)
        else:
            judged, values = np.stack([places(s, reference) for s in best]), np.array([scores[s] for s in best])
            made = offspring(judged[:_ROUND], values[:_ROUND], _CHILDREN, rng)
            if len(labels) > 1:  # every other one a step further
                made[::2] = [mutated(child, rng) for child in made[::2]]
            made = made[np.argsort(promise(judged, values, made), kind="stable")]
        fresh = list(dict.fromkeys(s for s in (tuple(labels[child].tolist()) for child in made) if s not in scores))
        tries = 0 if fresh else tries + 1
        if fresh := fresh[:count]:
            new = np.asarray(judge(fresh), dtype=np.float64)
            found |= zip(fresh, np.where(np.isfinite(new), new, np.inf).tolist(), strict=True)
            scores |= found
    ranked = sorted(found.items(), key=lambda item: (item[1], item[0]))
    return Found([s for s, _ in ranked], [v for _, v in ranked], len(found))


def promise(judged: NDArray[np.int64], values: NDArray[np.float64], orders: NDArray[np.int64]) -> NDArray[np.float64]:
    """[M]: the expected value of each order [M, T] less its standard deviation, given those judged [N, T]; low is good.

    A Gaussian process over orders, K = exp(-3 (1 - Spearman of two orders' positions)), of the values' mean and
    variance, with a tenth of it as noise; the lower confidence bound of arXiv 0912.3995 at one deviation.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    steps = judged.shape[1]
    long = max(1.0, float(np.sqrt((steps**3 - steps) / 12)))  # positions about their mean, of length 1

    def positions(permutations: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray((np.argsort(permutations, axis=1) - (steps - 1) / 2) / long)

    process = GaussianProcessRegressor(RBF(3**-0.5, "fixed"), alpha=0.1, optimizer=None, normalize_y=True)
    process.fit(positions(judged), values)
    expected, deviation = process.predict(positions(orders), return_std=True)
    return np.asarray(expected - deviation)
