"""BIDS: the least-served subtask takes its best row; also an aggregation, whose score is the position in that order."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from datatools import large
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.subtasks import averaging, subtask_means
from datatools.selection.turns import Queue, take_in_turns


def bids(
    candidates: Candidates,
    budget: Budget,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """The least-served subtask repeatedly takes its best remaining row.

    Ties between rows go to the smaller key. The order is that of `bids_order`.

    Cost: O(g n log n + n g) for n rows and g subtasks.

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
        BIDS, arXiv 2501.12147.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"], similarity=[[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]], groups=[0, 1])
        >>> bids(pool, Budget.parse(2)).indices.tolist()
        [0, 2]

    """
    return take_in_turns("bids", bids_order, candidates, budget, max_per_source)


def bids_order(similarity: Float[Tensor, "n m"], groups: Int64[Tensor, " m"]) -> NDArray[np.int64]:
    """Return the positions of all n rows in the order in which subtasks take them.

    z_ij = (s_ij - mean_i s_ij) / std_i s_ij for each target row j (0 if all rows are equal), and Z_ig is its mean over
    the rows j of subtask g. The service is u = sum of Z_i over the rows taken, initially 0. Each step takes, for the
    subtask g = argmin u (the first one in a tie), the remaining row with the highest Z_ig, and adds its vector Z_i to
    u.

    Args:
        similarity: floating dtype [n, m]; in ties the earlier row wins.
        groups: int64 [m], the subtask of each target row.

    Returns:
        int64 [n].

    Source:
        BIDS, arXiv 2501.12147: normalize for each target row, then choose the row with the highest influence on the
        most underrepresented task.

    Differs:
        The update of u follows that sentence of the abstract, not the authors' code.

    """
    if 4 * similarity.numel() <= large.LARGE:
        means = subtask_means(_normalised(similarity), groups).numpy()
    else:  # column by column
        share = averaging(groups, similarity.shape[1])
        means = np.zeros((len(similarity), len(share)), dtype=np.float32)
        for j, column in enumerate(similarity.T):
            group = int(share[:, j].argmax())
            means[:, group] += float(share[group, j]) * _normalised(column[:, None])[:, 0].float().numpy()
            large.release(similarity)
    queues = [Queue(means[:, g]) for g in range(means.shape[1])]
    served = np.zeros(means.shape[1])
    used = np.zeros(len(means), dtype=bool)
    order = np.empty(len(means), dtype=np.int64)
    for place in range(len(means)):
        order[place] = row = queues[int(served.argmin())].take(used)
        served += means[row]
    return order


def _normalised(similarity: Tensor) -> Tensor:
    """Return z, float64 [n, m]."""
    values = similarity.double()
    spread = values.std(0, correction=0)
    flat = spread <= 1e-12 * values.abs().amax(0)  # rounding leaves a constant column a spread of about 1e-17
    return torch.where(flat, 0.0, (values - values.mean(0)) / torch.where(flat, 1.0, spread))
