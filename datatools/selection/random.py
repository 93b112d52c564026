"""Rows drawn uniformly: the baseline that every method has to beat."""

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
    """Rows in a random order until the budget is full; `reference` means nothing here.

    The order comes from a hash of (seed, key), not from a stream of random numbers: it depends neither on the order
    of the rows nor on which other rows there are, and a larger budget contains the smaller one.

    Raises:
        UsageError: for a budget that the pool cannot fill.
    """
    order = candidates.order(-lottery(candidates, seed))
    chosen = fill(order, candidates, budget, max_per_source)
    return Selection(
        torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=[f"random, seed {seed}"] * len(chosen)
    )


def lottery(candidates: Candidates, seed: int, purpose: str = "random") -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), float64 [n].

    Each is a function of (purpose, seed, key, how often the key came before).
    """
    seen: Counter[str] = Counter()
    numbers = np.empty(len(candidates))
    for row, key in enumerate(candidates.keys):
        # 53 bits: what a float64 holds; copies of a row get numbers of their own
        ticket = f"{purpose}\0{seed}\0{key}\0{seen[key]}".encode("utf-8", "surrogatepass")
        numbers[row] = (xxhash.xxh3_64_intdigest(ticket) >> 11) * 2.0**-53
        seen[key] += 1
    return numbers
