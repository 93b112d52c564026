"""Coverage: every target row counts, and less the more rows that help it are taken already."""

from __future__ import annotations

import heapq

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.turns import take_in_turns


def coverage(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Take the row that adds most to the sum, over target rows, of the root of the similarity taken so far.

    Ties between rows go to the smaller key. The order is that of `coverage_order`.

    Cost: about O(m n log n) for n rows and m target rows.

    Args:
        candidates: the rows, with their similarity to target rows.
        budget: how much to choose.
        seed: not used.
        max_per_source: cap per source, see `fill`.
        reference: not used.

    Returns:
        The selection.

    Raises:
        UsageError: if there is no similarity, or the pool cannot fill the budget.

    Source:
        Sums of concave functions of what a selection holds of each feature: Kirchhoff and Bilmes 2014 (EMNLP),
        "Submodularity for data selection in machine translation". Here, the features of a row are its similarities.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"], similarity=[[0.9, 0.1], [0.8, 0.1], [0.1, 0.6]])
        >>> coverage(pool, Budget.parse(2)).indices.tolist()
        [0, 2]

    """
    return take_in_turns(
        "coverage", lambda similarity, groups: coverage_order(similarity), candidates, budget, max_per_source
    )


def coverage_order(similarity: Float[Tensor, "n m"]) -> NDArray[np.int64]:
    """Return the positions of all n rows in the order in which greedy maximization takes them.

    f(S) = sum_j sqrt(sum_{i in S} max(0, s_ij)); each step takes the row with the largest gain in f. Rows without a
    gain come last, by their mean similarity. f is monotone and submodular, so that the first k rows reach at least
    1 - 1/e of the largest f of any k rows, and a gain that was computed earlier bounds the present one from above:
    most rows need not be looked at in most steps ("lazy" evaluation).

    Args:
        similarity: floating dtype [n, m]; in ties the earlier row wins.

    Returns:
        int64 [n].

    Source:
        Nemhauser, Wolsey and Fisher 1978 (the bound); Minoux 1978 (lazy evaluation).

    Example:
        >>> coverage_order(torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.1, 0.6]])).tolist()
        [0, 2, 1]

    """
    values = similarity.double().clamp(min=0.0).numpy()
    held, roots = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    queue = [(-float(gain), row) for row, gain in enumerate(np.sqrt(values).sum(1)) if gain > 0]
    heapq.heapify(queue)
    order: list[int] = []
    while queue:
        _, row = queue[0]
        gain = float((np.sqrt(held + values[row]) - roots).sum())
        if len(queue) > 1 and (-gain, row) > min(queue[1:3]):
            heapq.heapreplace(queue, (-gain, row))
            continue
        heapq.heappop(queue)
        order.append(row)
        held += values[row]
        roots = np.sqrt(held)
    rest = np.setdiff1d(np.arange(len(values)), order)
    left = similarity[torch.from_numpy(rest)].double().numpy().mean(1)
    return np.concatenate([np.asarray(order, np.int64), rest[np.argsort(-left, kind="stable")]])
