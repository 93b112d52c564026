"""Target rows take turns; also as an aggregation, whose score is the place in the order of the turns."""

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
    """Target rows in turn each take the best row that is left.

    `seed` and `reference` mean nothing here. Among equally similar rows the smaller key is taken first.

    Cost:
        O(m n log n) for n rows and m target rows.

    Source:
        arXiv 2602.14696 finds it the best at small budgets; RDS+ (arXiv 2503.01807) takes rows in this way.

    Raises:
        UsageError: There is no similarity, or the pool cannot fill the budget.

    >>> pool = Candidates(keys=["a", "b", "c"], similarity=[[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]])
    >>> round_robin(pool, Budget.parse(2)).indices.tolist()
    [0, 2]
    """
    return take_in_turns(
        "round_robin", lambda similarity, groups: round_robin_order(similarity), candidates, budget, max_per_source
    )


def round_robin_order(similarity: Float[Tensor, "n m"]) -> NDArray[np.int64]:
    """Return the positions of all n rows in the order in which m target rows take them in turns.

    Args:
        similarity: [n, m], of any floating dtype; the earlier row wins a tie.

    Returns:
        int64 [n].
    """
    values = similarity.float().numpy()
    queues = [Queue(values[:, j]) for j in range(values.shape[1])]
    used = np.zeros(len(values), dtype=bool)
    order = np.empty(len(values), dtype=np.int64)
    for place in range(len(values)):
        order[place] = queues[place % len(queues)].take(used)
    return order
