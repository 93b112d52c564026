"""Code shared by selectors in which target rows or subtasks take turns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import large
from datatools.errors import UsageError
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.fill import fill


class Queue:
    """Rows in descending order of a value, ties by position; `take` removes the best one that is left.

    Only the best rows are held in order, twice as many each time they are used up, so that memory depends on how many
    rows are taken and not on how many there are.

    Args:
        values: [n], finite.
        first: How many rows are put in order at first.

    """

    def __init__(self, values: NDArray[np.float32], first: int = 1024) -> None:
        self._values, self._many = values, first
        self._order = np.zeros(0, np.int64)
        self._next = 0

    def take(self, used: NDArray[np.bool_]) -> int:
        """Take the best row that is not used, and mark it as used. At least one must be unused.

        Args:
            used: bool [n], changed in place.

        Returns:
            Position of the row.

        """
        look = 16
        while True:
            if self._next >= len(self._order):
                self._order, self._next = self._best(used), 0
                self._many *= 2
            free = ~used[self._order[self._next : self._next + look]]
            step = int(free.argmax())
            if free[step]:
                self._next += step
                row = int(self._order[self._next])
                used[row] = True
                return row
            self._next += len(free)
            look *= 2

    def _best(self, used: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the best rows that are left, in order."""
        rows = np.flatnonzero(~used)
        values = self._values[rows]
        if len(rows) > self._many:
            least = np.partition(values, len(rows) - self._many)[len(rows) - self._many]
            better = values > least
            equal = np.flatnonzero(values == least)[: self._many - int(better.sum())]  # the first of equal ones
            better[equal] = True
            rows, values = rows[better], values[better]
        return rows[np.argsort(-values, kind="stable")]


def take_in_turns(
    name: str,
    order_of: Callable[[Tensor, Tensor], NDArray[np.int64]],
    candidates: Candidates,
    budget: Budget,
    max_per_source: str | float | None,
) -> Selection:
    """Fill the budget in the order in which target rows take the eligible rows.

    Args:
        name: name of the selector, for messages.
        order_of: (similarity [e, m], groups int64 [m]) -> positions of the e rows in the order of their turns, int64
            [e].
        candidates: the rows, with `similarity`; ties go to the smaller key.
        budget: how much to choose.
        max_per_source: cap per source, see `fill`.

    Returns:
        The selection; each reason states the turn in which the row was taken.

    Raises:
        UsageError: if there is no similarity, or the pool cannot fill the budget.

    """
    if candidates.similarity is None or candidates.groups is None:
        raise UsageError(
            f"{name} needs the similarity of candidates to target rows, which is missing; pass `similarity`, "
            "or use 'top_k' or 'random'"
        )
    rows = candidates.order(np.zeros(len(candidates)))  # by key
    order = (
        rows[order_of(large.taken(candidates.similarity, torch.from_numpy(rows)), candidates.groups)]
        if len(rows)
        else rows
    )
    chosen = fill(order, candidates, budget, max_per_source)
    turn = np.zeros(len(candidates), dtype=np.int64)
    turn[order] = np.arange(1, len(order) + 1)
    best = candidates.similarity[chosen].amax(1).tolist()
    why = [
        f"taken in turn {turn[row]} of {len(order)}, similarity at most {near:.4g}"
        for row, near in zip(chosen, best, strict=True)
    ]
    return Selection(torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=why)
