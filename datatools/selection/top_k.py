"""The rows with the highest scores."""

import numpy as np
import torch

from datatools.errors import UsageError
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.fill import fill


def top_k(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Choose rows in the order of (-score, key) until the budget is full.

    Cost: O(n log n).

    Args:
        candidates: the rows, with scores.
        budget: how much to choose.
        seed: not used.
        max_per_source: cap per source, see `fill`.
        reference: not used.

    Returns:
        The selection; each reason states score and rank.

    Raises:
        UsageError: without scores, or if the pool cannot fill the budget.

    Source:
        LESS, arXiv 2402.04333, step 3 (its code leaves ties undefined; here the key decides).

    Example:
        >>> top_k(Candidates(keys=["a", "b", "c"], scores=[0.1, 0.9, 0.5]), Budget.parse(2)).why
        ['score 0.9, rank 1 of 3', 'score 0.5, rank 2 of 3']

    """
    if candidates.scores is None:
        raise UsageError("top_k needs scores, which the candidates lack; score them, or use 'random'")
    order = candidates.order(candidates.scores.numpy())
    chosen = fill(order, candidates, budget, max_per_source)
    rank = np.zeros(len(candidates), dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    why = [f"score {candidates.scores[row]:.4g}, rank {rank[row]} of {len(order)}" for row in chosen]
    return Selection(torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=why)
