"""What selectors share in which target rows, or subtasks, take rows in turns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import UsageError
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.fill import fill


class Queue:
    """The rows by falling value, ties by position, of which the best that is left is taken again and again."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._order = np.argsort(-values, kind="stable").astype(np.int32)
        self._next = 0

    def take(self, used: NDArray[np.bool_]) -> int:
        """The first row that is not `used`, which becomes so. One must be left."""
        look = 16
        while True:
            free = ~used[self._order[self._next : self._next + look]]
            step = int(free.argmax())
            if free[step]:
                self._next += step
                row = int(self._order[self._next])
                used[row] = True
                return row
            self._next += len(free)
            look *= 2


def take_in_turns(
    name: str,
    order_of: Callable[[Tensor, Tensor], NDArray[np.int64]],
    candidates: Candidates,
    budget: Budget,
    max_per_source: str | float | None,
) -> Selection:
    """Fill the budget in the order in which target rows take the eligible rows.

    Args:
        name: The selector, for messages.
        order_of: (similarity [e, m], groups int64 [m]) -> the positions of the e rows in the order of their turns.
        candidates: The rows; `similarity` is needed, and ties go to the smaller key.
        budget: How much to choose.
        max_per_source: A cap per source, see `fill`.

    Returns:
        The selection; a reason says in which turn a row was taken.

    Raises:
        UsageError: There is no similarity, or the pool cannot fill the budget.
    """
    if candidates.similarity is None or candidates.groups is None:
        raise UsageError(
            f"{name} takes turns between target rows, and the candidates have no similarity to any; compare them with "
            "target rows, or use 'top_k' or 'random'"
        )
    rows = candidates.order(np.zeros(len(candidates)))  # by key
    order = rows[order_of(candidates.similarity[torch.from_numpy(rows)], candidates.groups)] if len(rows) else rows
    chosen = fill(order, candidates, budget, max_per_source)
    turn = {row: place for place, row in enumerate(order.tolist(), start=1)}
    best = candidates.similarity[chosen].amax(1).tolist()
    why = [
        f"taken in turn {turn[row]} of {len(order)}, similarity at most {near:.4g}"
        for row, near in zip(chosen, best, strict=True)
    ]
    return Selection(torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=why)
