"""Search for the best order: each method proposes permutations, a surrogate scores them, and the best are kept.

local   swaps and moves from the best start (Borda, curricula) until none is an improvement, then from another start
genetic tournament 3, order crossover 0.9, mutation 0.2 (swap, move, reverse), 2 elites (spec A.8)
borda   batches sorted by the row sums of the precedence matrix, or by the regression of the score on their position
random  random orders within the same budget: the baseline that a search must beat

The optimum of an estimate is where its errors are most favourable: `refine` continues from there with a better, more
expensive estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import DataError, UsageError, did_you_mean
from datatools.order.estimators.surrogate import Surrogate
from datatools.order.moves import Permutation, neighbours, offspring, places

_EXACT_LIMIT = 12


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        sequences: the orders, best first, each once.
        scores: their scores.
        evaluations: number of orders that were scored.

    Example:
        >>> Found([(1, 0)], [0.5], evaluations=2).sequences[0]
        (1, 0)

    """

    sequences: list[tuple[int, ...]]
    scores: list[float]
    evaluations: int


class _Scorer:
    """Scores permutations of the reference's positions, counts them, and remembers the best ones."""

    def __init__(
        self, surrogate: Surrogate, budget: int, keep: int, advance: Callable[[int], object] | None = None
    ) -> None:
        self.surrogate, self.budget, self.keep, self.advance = surrogate, budget, keep, advance
        self.labels = np.asarray(surrogate.sequence, dtype=np.int64)
        self.used = 0
        self.best: dict[tuple[int, ...], float] = {}

    @property
    def left(self) -> int:
        return self.budget - self.used

    def __call__(self, permutations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Score permutations [R, T] -> [R]; those beyond the budget get inf."""
        scores = np.full(len(permutations), np.inf)
        allowed = permutations[: max(0, self.left)]
        if len(allowed):
            sequences = self.labels[allowed]
            scores[: len(allowed)] = self.surrogate.ranked(torch.from_numpy(sequences)).numpy()
            self.used += len(allowed)
            if self.advance is not None:
                self.advance(len(allowed))
            for index in np.argsort(scores[: len(allowed)], kind="stable")[: self.keep]:
                if np.isfinite(scores[index]):
                    self.best[tuple(sequences[index].tolist())] = float(scores[index])
            if len(self.best) > 4 * self.keep:
                self.best = dict(sorted(self.best.items(), key=lambda item: item[1])[: self.keep])
        return scores

    def found(self) -> Found:
        ranked = sorted(self.best.items(), key=lambda item: (item[1], item[0]))[: self.keep]
        return Found([s for s, _ in ranked], [v for _, v in ranked], self.used)


def search(
    surrogate: Surrogate,
    method: str = "local",
    *,
    budget: int = 20_000,
    seed: int = 0,
    starts: Sequence[Sequence[int]] = (),
    keep: int = 5,
    advance: Callable[[int], object] | None = None,
) -> Found:
    """Find the best orders by scoring at most `budget` orders; lower scores are better.

    Args:
        surrogate: the estimate that scores orders.
        method: a name of `SEARCHES`.
        budget: largest number of orders to score.
        seed: seed of random orders and moves.
        starts: orders to start from (curricula); the reference is always included.
        keep: number of orders to return.
        advance: called with the number of orders after each group is scored.

    Returns:
        The best orders.

    Raises:
        UsageError: if the method is unknown, or a start is not a permutation of the reference.
        DataError: if no scored order has a finite estimate.

    Example:
        >>> from datatools.order import precompute
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> found = search(precompute("pairwise", reference, problem), budget=200)
        >>> len(found.sequences), found.scores[0] == min(found.scores)
        (5, True)

    """
    if method not in SEARCHES:
        raise UsageError(f"order: unknown search {method!r}{did_you_mean(method, SEARCHES)}")
    if budget < 1 or keep < 1:
        raise UsageError(f"order: a search with budget={budget} and keep={keep}; both must be at least 1")
    scorer = _Scorer(surrogate, budget, keep, advance)
    given = [np.arange(len(surrogate.sequence))] + [places(start, surrogate.sequence) for start in starts]
    SEARCHES[method](scorer, given, np.random.default_rng(seed))
    if not scorer.best:
        raise DataError(
            f"order: none of the {scorer.used:,} scored orders has a finite estimate, because the estimated runs "
            "diverge; lower the learning rate of the reference run"
        )
    return scorer.found()


def _random(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """As many random orders as the budget allows."""
    scorer(np.stack(starts))
    steps = len(starts[0])
    while scorer.left > 0:
        scorer(rng.permuted(np.tile(np.arange(steps), (min(scorer.left, 512), 1)), axis=1))


def borda_order(surrogate: Surrogate, scorer: _Scorer | None = None, *, seed: int = 0) -> Permutation:
    """Sort positions by the cost of having their batches late.

    The cost is the row sum of a precedence matrix; for other surrogates, it is the slope of the score in the position
    of the batch, over 4 T random orders (at most half the budget).

    Args:
        surrogate: the estimate.
        scorer: counts the scored orders against a budget.
        seed: seed of the random orders.

    Returns:
        Positions in the reference's sequence, int64 [T].

    Example:
        >>> from datatools.order import precompute
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> sorted(borda_order(precompute("pairwise", reference, problem)).tolist())
        [0, 1, 2, 3]

    """
    steps = len(surrogate.sequence)
    if (costs := surrogate.matrix()) is not None:
        matrix = costs.numpy()
        labels = np.asarray(surrogate.sequence)
        # matrix[i, j] is the cost of i before j: the batch with the lowest sum goes first
        return np.argsort(matrix[labels][:, labels].sum(1), kind="stable").astype(np.int64)
    scorer = scorer or _Scorer(surrogate, 4 * steps, 1)
    rng = np.random.default_rng(seed)
    count = max(2, min(4 * steps, scorer.left // 2))
    drawn = rng.permuted(np.tile(np.arange(steps), (count, 1)), axis=1)
    scores = scorer(drawn)
    usable = np.isfinite(scores)
    if not usable.any():
        return np.arange(steps)
    positions = np.argsort(drawn[usable], axis=1).astype(np.float64)
    slope = (positions - positions.mean(0)).T @ (scores[usable] - scores[usable].mean())
    return np.argsort(-slope, kind="stable").astype(np.int64)  # a score that rises with the position: early


def _borda(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """One order: batches sorted by the cost of having them late (`borda_order`)."""
    scorer(borda_order(scorer.surrogate, scorer, seed=int(rng.integers(2**31)))[None])


def _local(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """Local search from the best known and random orders, by swaps and moves as long as one is an improvement."""
    borda = borda_order(scorer.surrogate, scorer, seed=int(rng.integers(2**31)))
    pool = [borda, *starts]
    scores = scorer(np.stack(pool))
    queue = [pool[i] for i in np.argsort(scores, kind="stable")]
    steps = len(borda)
    moves = np.array([(kind, a, b) for kind in (0, 1) for a in range(steps) for b in range(steps) if a != b])
    moves = moves.reshape(-1, 3)
    moves = moves[~((moves[:, 0] == 0) & (moves[:, 1] > moves[:, 2]))]
    while scorer.left > 0 and len(moves):
        current = queue.pop(0) if queue else rng.permutation(steps)
        value = float(scorer(current[None])[0])
        batch = scorer.surrogate.together
        improved = True
        while improved and scorer.left > 0:
            improved = False
            order = rng.permutation(len(moves))
            for lo in range(0, len(moves), batch):
                tried = neighbours(current, moves[order[lo : lo + batch]])
                found = scorer(tried)
                if scorer.left <= 0 and not np.isfinite(found).any():
                    break
                best = int(np.argmin(found))
                if found[best] < (value - 1e-12 * max(1.0, abs(value)) if np.isfinite(value) else value):
                    current, value, improved = tried[best], float(found[best]), True


def _genetic(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """A genetic algorithm: crossovers and mutations of the best orders so far."""
    steps, size = len(starts[0]), max(4, min(64, scorer.budget // 10))
    population = np.stack(
        [*starts, borda_order(scorer.surrogate, scorer, seed=int(rng.integers(2**31)))][:size]
        + [rng.permutation(steps) for _ in range(max(0, size - len(starts) - 1))]
    )
    scores = scorer(population)
    while scorer.left > 0:
        elites = np.argsort(scores, kind="stable")[:2]
        made = offspring(population, scores, size - 2, rng)
        population, scores = np.concatenate([population[elites], made]), np.concatenate([scores[elites], scorer(made)])


SEARCHES: dict[str, Callable[[_Scorer, list[Permutation], np.random.Generator], None]] = {
    "local": _local,
    "genetic": _genetic,
    "borda": _borda,
    "random": _random,
}
"""Name -> search."""


def exact_order(costs: Float[Tensor, "n n"]) -> tuple[list[int], float]:
    """Find the order of at most 12 groups that minimizes the sum of costs[i, j] over i before j.

    This uses dynamic programming over subsets, O(2^n n^2).

    Args:
        costs: floating dtype [n, n]; the diagonal is ignored.

    Returns:
        The order and the sum.

    Raises:
        UsageError: if there are more groups.

    Source:
        Held & Karp 1962.

    Example:
        >>> exact_order(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        ([1, 0], -1.0)

    """
    n = len(costs)
    if n > _EXACT_LIMIT:
        raise UsageError(
            f"order: an exact search of {n} groups is not possible; use at most {_EXACT_LIMIT}, or method 'local'"
        )
    cost = costs.double().numpy()
    best = np.full(1 << n, np.inf)
    last = np.zeros(1 << n, dtype=np.int64)
    best[0] = 0.0
    into = np.zeros((n, 1 << n))  # into[j, S] = sum of cost[i, j] over i in S
    for subset in range(1, 1 << n):
        low = (subset & -subset).bit_length() - 1
        into[:, subset] = into[:, subset & (subset - 1)] + cost[low]
    for subset in range(1, 1 << n):
        for j in range(n):
            if subset >> j & 1:
                without = subset ^ (1 << j)
                value = best[without] + into[j, without]
                if value < best[subset]:
                    best[subset], last[subset] = value, j
    order, subset = [], (1 << n) - 1
    while subset:
        order.append(int(last[subset]))
        subset ^= 1 << order[-1]
    return order[::-1], float(best[-1])
