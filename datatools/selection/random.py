"""Rows drawn uniformly at random: the baseline that every method has to beat."""

from collections import Counter

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.fill import fill


def random(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Choose rows in a random order until the budget is full.

    The order is computed from a hash of (seed, key), not from a stream of random numbers. So it depends neither on the
    order of the rows nor on which other rows there are, and a larger budget contains the selection of a smaller one.

    Args:
        candidates: the rows.
        budget: how much to choose.
        seed: seed of the order.
        max_per_source: cap per source, see `fill`.
        reference: not used.

    Returns:
        The selection.

    Raises:
        UsageError: if the pool cannot fill the budget.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"])
        >>> small, large = random(pool, Budget.parse(1)), random(pool, Budget.parse(2))
        >>> bool(small.indices[0] == large.indices[0])
        True

    """
    order = candidates.order(-lottery(candidates, seed))
    chosen = fill(order, candidates, budget, max_per_source)
    return Selection(
        torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=[f"random, seed {seed}"] * len(chosen)
    )


def lottery(candidates: Candidates, seed: int, purpose: str = "random") -> NDArray[np.float64]:
    """Generate uniform numbers in [0, 1), each a function of purpose, seed, key and number of earlier copies of it.

    Args:
        candidates: the rows.
        seed: seed of the numbers.
        purpose: separates numbers that are used for different purposes.

    Returns:
        float64 [n].

    Example:
        >>> a, b, copy = lottery(Candidates(keys=["a", "b", "a"]), seed=0)
        >>> bool(a == lottery(Candidates(keys=["a"]), seed=0)[0]), bool(a == copy)
        (True, False)

    """
    seen: Counter[str] | None = None if getattr(candidates.keys, "distinct", False) else Counter()
    numbers, copy = np.empty(len(candidates)), 0
    for row, key in enumerate(candidates.keys):
        if seen is not None:
            copy = seen[key]
            seen[key] += 1
        # 53 bits, the precision of float64; copies of a row get different numbers
        ticket = f"{purpose}\0{seed}\0{key}\0{copy}".encode("utf-8", "surrogatepass")
        numbers[row] = (xxhash.xxh3_64_intdigest(ticket) >> 11) * 2.0**-53
    return numbers
