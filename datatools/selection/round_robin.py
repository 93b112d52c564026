"""Target rows take turns; also an aggregation, whose score is the position in the order of the turns."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.turns import Queue, take_in_turns


def round_robin(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Target rows take turns, each taking its most similar remaining row.

    Ties between rows go to the smaller key.

    Cost: O(m n log n) for n rows and m target rows.

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
        arXiv 2602.14696 finds it the best at small budgets; RDS+ (arXiv 2503.01807) takes rows in this way.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"], similarity=[[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]])
        >>> round_robin(pool, Budget.parse(2)).indices.tolist()
        [0, 2]

    """
    return take_in_turns(
        "round_robin", lambda similarity, groups: round_robin_order(similarity), candidates, budget, max_per_source
    )


def round_robin_order(similarity: Float[Tensor, "n m"]) -> NDArray[np.int64]:
    """Return the positions of all n rows in the order in which m target rows take turns.

    Args:
        similarity: floating dtype [n, m]; in ties the earlier row wins.

    Returns:
        int64 [n].

    Example:
        >>> import torch
        >>> round_robin_order(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]])).tolist()
        [0, 2, 1]

    """
    values = similarity.float().numpy()
    queues = [Queue(values[:, j]) for j in range(values.shape[1])]
    used = np.zeros(len(values), dtype=bool)
    order = np.empty(len(values), dtype=np.int64)
    for place in range(len(values)):
        order[place] = queues[place % len(queues)].take(used)
    return order
