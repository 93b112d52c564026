"""Which order is best? Every method proposes permutations, a surrogate scores them, the best are kept.

local   swaps and moves from the best start there is (Borda, curricula), until none helps; then again from elsewhere
genetic tournament 3, order crossover 0.9, mutation 0.2 (swap, move, reverse), 2 elites (spec A.8)
borda   batches sorted by the row sums of the precedence matrix, or by their regressed effect of position
random  as many random orders as the others may score: what a search must beat

An optimum of an estimate is where its errors help it most: `refine` lets a better, more expensive one look on from
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import DataError, UsageError, did_you_mean
from datatools.files.order_file import check_permutation
from datatools.order.estimators.surrogate import Surrogate

Permutation = NDArray[np.int64]  # [T], places of the reference's sequence
_EXACT_LIMIT = 12


@dataclass(frozen=True)
class Found:
    """The orders of a search, best first: each once, with its score; and how many orders it scored."""

    sequences: list[tuple[int, ...]]
    scores: list[float]
    evaluations: int


class _Scorer:
    """Scores permutations of the reference's places, counts them, and remembers the best few."""

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
        """[R, T] -> [R]; not more than the budget allows are scored, the others get infinity."""
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
    """The best orders that a search finds by scoring at most `budget` orders; lower scores are better.

    Args:
        surrogate: what scores the orders.
        method: a name in `SEARCHES`.
        budget: the most orders to score.
        seed: of random orders and moves.
        starts: orders to begin with (curricula); the reference is always one.
        keep: how many of the best orders to return.
        advance: called with the number of orders that were scored, each time.

    Raises:
        UsageError: for an unknown method, or a start that is no permutation of the reference.
        DataError: where no order that was scored has a finite estimate.

    Example:
        >>> from datatools.order import precompute
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> found = search(precompute("pairwise", reference, problem), budget=200)
        >>> len(found.sequences), found.scores[0] == min(found.scores)
        (5, True)
    """
    if method not in SEARCHES:
        raise UsageError(f"order: no search is called {method!r}{did_you_mean(method, SEARCHES)}")
    if budget < 1 or keep < 1:
        raise UsageError(f"order: a search of {budget} orders that keeps {keep}; both must be at least 1")
    scorer = _Scorer(surrogate, budget, keep, advance)
    given = [np.arange(len(surrogate.sequence))] + [places(start, surrogate.sequence) for start in starts]
    SEARCHES[method](scorer, given, np.random.default_rng(seed))
    if not scorer.best:
        raise DataError(
            f"order: none of the {scorer.used:,} orders that were scored has a finite estimate: the estimated runs "
            "diverge; lower the learning rate of the reference run"
        )
    return scorer.found()


def places(sequence: Sequence[int], reference: Sequence[int]) -> Permutation:
    """The permutation p with reference[p[t]] = sequence[t]; repeated batches keep their turn.

    Example:
        >>> places([7, 5, 7], reference=[5, 7, 7]).tolist()
        [1, 0, 2]
    """
    where: dict[int, list[int]] = {}
    for place, batch in reversed(list(enumerate(reference))):
        where.setdefault(int(batch), []).append(place)
    try:
        if len(sequence) != len(reference):
            raise IndexError
        return np.array([where[int(batch)].pop() for batch in sequence], dtype=np.int64)
    except (KeyError, IndexError):
        check_permutation(sequence, reference)
        raise


def _random(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """Random orders, as many as the budget allows."""
    scorer(np.stack(starts))
    steps = len(starts[0])
    while scorer.left > 0:
        scorer(rng.permuted(np.tile(np.arange(steps), (min(scorer.left, 512), 1)), axis=1))


def borda_order(surrogate: Surrogate, scorer: _Scorer | None = None, *, seed: int = 0) -> Permutation:
    """Places sorted by what it costs to have them late.

    Of a precedence matrix its row sums; of any other surrogate the slope of its score in a place's position, over 4 T
    random orders (at most half the budget).
    """
    steps = len(surrogate.sequence)
    if (costs := surrogate.matrix()) is not None:
        matrix = costs.numpy()
        labels = np.asarray(surrogate.sequence)
        # matrix[i, j] is the cost of i before j: the lowest sum over all others goes first
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
    return np.argsort(-slope, kind="stable").astype(np.int64)  # a score that rises with the position: go early


def _borda(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """One order: batches sorted by what it costs to have them late (`borda_order`)."""
    scorer(borda_order(scorer.surrogate, scorer, seed=int(rng.integers(2**31)))[None])


def neighbours(permutation: Permutation, places_: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every (kind, a, b) of `places_` [M, 3]: the permutation with a and b swapped (0), or a moved to b (1)."""
    made = np.tile(permutation, (len(places_), 1))
    for row, (kind, a, b) in zip(made, places_, strict=True):
        if kind == 0:
            row[a], row[b] = row[b], row[a]
        elif a < b:
            row[a : b + 1] = np.roll(row[a : b + 1], -1)
        else:
            row[b : a + 1] = np.roll(row[b : a + 1], 1)
    return made


def _local(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """Local search from the best known and random orders: swaps and moves, as long as one is better."""
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


def order_crossover(first: Permutation, second: Permutation, lo: int, hi: int) -> Permutation:
    """OX: first's places lo..hi-1 where they are, the others in second's order from hi on."""
    child = np.empty_like(first)
    child[lo:hi] = first[lo:hi]
    rest = np.roll(second, -hi)
    rest = rest[~np.isin(rest, first[lo:hi])]
    steps = len(first)
    child[(hi + np.arange(steps - (hi - lo))) % steps] = rest
    return child


def offspring(
    parents: NDArray[np.int64], scores: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`count` children [count, T] of parents [P, T]: tournament 3, order crossover 0.9, mutation 0.2 (spec A.8)."""
    size, steps = parents.shape
    children = []
    for _ in range(count):
        one, two = (min(rng.integers(size, size=3), key=lambda i: scores[i]) for _ in range(2))
        child = parents[one].copy()
        if rng.random() < 0.9 and steps > 1:
            lo, hi = sorted(rng.choice(steps + 1, size=2, replace=False))
            child = order_crossover(parents[one], parents[two], int(lo), int(hi))
        if rng.random() < 0.2 and steps > 1:
            child = mutated(child, rng)
        children.append(child)
    return np.stack(children)


def mutated(child: Permutation, rng: np.random.Generator) -> Permutation:
    """Two places swapped, one moved to the other, or all between them reversed."""
    a, b = (int(x) for x in rng.choice(len(child), size=2, replace=False))
    kind = int(rng.integers(3))
    if kind == 2:
        lo, hi = min(a, b), max(a, b) + 1
        return np.concatenate([child[:lo], child[lo:hi][::-1], child[hi:]])
    made: Permutation = neighbours(child, np.array([(kind, a, b)]))[0]
    return made


def _genetic(scorer: _Scorer, starts: list[Permutation], rng: np.random.Generator) -> None:
    """A genetic algorithm: crosses and mutations of the best orders so far."""
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


def exact_order(costs: Tensor) -> tuple[list[int], float]:
    """The order of at most 12 groups that minimises the sum of costs[i, j] over i before j, and that sum.

    Dynamic programming over subsets, O(2^n n^2).

    Args:
        costs: [n, n], any float dtype; the diagonal is not read.

    Raises:
        UsageError: for more groups.

    Source:
        Held & Karp 1962.

    Example:
        >>> exact_order(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        ([1, 0], -1.0)
    """
    n = len(costs)
    if n > _EXACT_LIMIT:
        raise UsageError(f"order: exact search of {n} groups; at most {_EXACT_LIMIT}, use method 'local'")
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


# ----------------------------------------------------------------------------------------------------------- curricula
