"""Improve orders with a judge that is too expensive for `search`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from datatools.order.moves import mutated, offspring, places
from datatools.order.search import Found

_ROUND = 8  # orders passed to the judge at once, and number of parents of the next ones
_CHILDREN = 512  # candidates per round, of which the most promising are judged
_FITTED = 512  # judged orders to which the model of promise is fitted


def refine(
    judge: Callable[[list[tuple[int, ...]]], Sequence[float]],
    known: Mapping[tuple[int, ...], float],
    reference: Sequence[int],
    *,
    budget: int = 64,
    seed: int = 0,
) -> Found:
    """Find better orders than the known ones with a judge that is too expensive for `search`.

    A quarter of the budget goes to random orders, so that the common errors of the known orders do not decide. Then, in
    rounds of 8, the most promising (`promise`) of many children (`offspring`) of the 8 best orders are judged. No order
    is judged twice. Scores that are not finite become inf, and such orders are not used as parents.

    Args:
        judge: at most 8 orders -> their scores; lower is better.
        known: orders with known scores.
        reference: the sequence of which orders are permutations.
        budget: largest number of orders to judge.
        seed: seed of the orders that are proposed.

    Returns:
        The new orders only, best first.

    Example:
        >>> def judge(orders):
        ...     return [abs(order[0] - 2) for order in orders]
        >>> refine(judge, {(0, 1, 2): 2.0}, reference=(0, 1, 2), budget=4).scores[0]
        0.0

    """
    rng, labels = np.random.default_rng(seed), np.asarray(reference, dtype=np.int64)
    scores = {tuple(map(int, sequence)): float(value) for sequence, value in known.items()}
    found: dict[tuple[int, ...], float] = {}
    tries = 0  # ends the loop if few batches have fewer orders than the budget
    while len(found) < budget and tries < 50:
        best = sorted((s for s in scores if np.isfinite(scores[s])), key=lambda s: (scores[s], s))[:_FITTED]
        first = budget // 4 - len(found)
        count = min(_ROUND, first if first > 0 else budget - len(found))
        if first > 0 or len(best) < 2:
            made = rng.permuted(np.tile(np.arange(len(labels)), (count, 1)), axis=1)
        else:
            judged, values = np.stack([places(s, reference) for s in best]), np.array([scores[s] for s in best])
            made = offspring(judged[:_ROUND], values[:_ROUND], _CHILDREN, rng)
            if len(labels) > 1:  # mutate every other child
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
    """Compute the expected value of each order minus its standard deviation, given the judged orders; low is good.

    The model is a Gaussian process over orders with kernel exp(-3 (1 - Spearman of the positions)), with the mean and
    variance of the values, and a tenth of the variance as noise.

    Args:
        judged: permutations [N, T].
        values: their scores [N].
        orders: permutations [M, T].

    Returns:
        float64 [M].

    Source:
        The lower confidence bound of arXiv 0912.3995 at one standard deviation.

    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    steps = judged.shape[1]
    long = max(1.0, float(np.sqrt((steps**3 - steps) / 12)))  # norm of the centred positions, which are scaled to 1

    def positions(permutations: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray((np.argsort(permutations, axis=1) - (steps - 1) / 2) / long)

    process = GaussianProcessRegressor(RBF(3**-0.5, "fixed"), alpha=0.1, optimizer=None, normalize_y=True)
    process.fit(positions(judged), values)
    expected, deviation = process.predict(positions(orders), return_std=True)
    return np.asarray(expected - deviation)
