"""Permutations, and the moves between them that searches make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from datatools.files.order_file import check_permutation

Permutation = NDArray[np.int64]
"""[T], positions in the reference's sequence."""


def places(sequence: Sequence[int], reference: Sequence[int]) -> Permutation:
    """Find the permutation p with reference[p[t]] = sequence[t]; repeated batches keep their order.

    Args:
        sequence: batch numbers [T].
        reference: the reference's batch numbers [T].

    Returns:
        int64 [T].

    Raises:
        UsageError: if `sequence` is not a permutation of `reference` (an IndexError or KeyError inside becomes one).

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


def neighbours(permutation: Permutation, places_: NDArray[np.int64]) -> NDArray[np.int64]:
    """Apply moves to a permutation.

    Args:
        permutation: [T].
        places_: moves (kind, a, b) [M, 3]: kind 0 swaps positions a and b, kind 1 moves a to b.

    Returns:
        int64 [M, T].

    Example:
        >>> neighbours(np.array([0, 1, 2]), np.array([(0, 0, 2), (1, 0, 2)])).tolist()
        [[2, 1, 0], [1, 2, 0]]

    """
    made = np.tile(permutation, (len(places_), 1))
    for row, (kind, a, b) in zip(made, places_, strict=True):
        if kind == 0:
            row[a], row[b] = row[b], row[a]
        elif a < b:
            row[a : b + 1] = np.roll(row[a : b + 1], -1)
        else:
            row[b : a + 1] = np.roll(row[b : a + 1], 1)
    return made


def order_crossover(first: Permutation, second: Permutation, lo: int, hi: int) -> Permutation:
    """Order crossover (OX): keep positions lo..hi-1 of `first`; fill the others in the order of `second` from hi on.

    Args:
        first: permutation [T].
        second: permutation [T].
        lo: start of the kept positions.
        hi: end of the kept positions, exclusive.

    Returns:
        int64 [T].

    Example:
        >>> order_crossover(np.array([0, 1, 2, 3]), np.array([3, 2, 1, 0]), 1, 3).tolist()
        [3, 1, 2, 0]

    """
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
    """Create children by tournaments of 3, order crossover (probability 0.9) and mutation (0.2); spec A.8.

    Args:
        parents: permutations [P, T].
        scores: their scores [P]; lower is better.
        count: number of children.
        rng: source of randomness.

    Returns:
        int64 [count, T].

    """
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
    """Swap two random positions, move one to the other, or reverse all between them.

    Args:
        child: permutation [T].
        rng: source of randomness.

    Returns:
        int64 [T].

    """
    a, b = (int(x) for x in rng.choice(len(child), size=2, replace=False))
    kind = int(rng.integers(3))
    if kind == 2:
        lo, hi = min(a, b), max(a, b) + 1
        return np.concatenate([child[:lo], child[lo:hi][::-1], child[hi:]])
    made: Permutation = neighbours(child, np.array([(kind, a, b)]))[0]
    return made
