"""The rows with the highest scores."""

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
    """Rows in the order of (-score, key) until the budget is full; `seed` and `reference` mean nothing here.

    Cost: O(n log n).
    Source: LESS, arXiv 2402.04333, step 3 (its code leaves ties undefined; here the key decides).

    Raises:
        UsageError: without scores, or for a budget that the pool cannot fill.
    """
    if candidates.scores is None:
        raise UsageError("top_k needs scores and the candidates have none; score them, or use 'random'")
    order = candidates.order(candidates.scores.numpy())
    chosen = fill(order, candidates, budget, max_per_source)
    rank = {row: place for place, row in enumerate(order[: order.tolist().index(chosen[-1]) + 1].tolist(), start=1)}
    why = [f"score {candidates.scores[row]:.4g}, rank {rank[row]} of {len(order)}" for row in chosen]
    return Selection(torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=why)
