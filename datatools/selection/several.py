"""Selection for several targets at once: each has a score for every row, and takes rows in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from datatools.errors import UsageError, did_you_mean
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection, require_finite
from datatools.selection.fill import fill
from datatools.selection.turns import Queue

SHARINGS: dict[str, str] = {
    "union": "targets take turns, each its best row that is left; a row counts for the target that took it",
    "maxmin": "the target that the rows so far serve worst takes its best row that is left",
}
"""How several targets share a budget."""


def several(
    how: str,
    scores: Float[Tensor, "n t"],
    names: Sequence[str],
    candidates: Candidates,
    budget: Budget | str | int,
    *,
    budgets: Mapping[str, str | int] | None = None,
    max_per_source: str | float | None = None,
) -> Selection:
    """Choose rows for several targets.

    With "union", targets take turns in the order of their names: each takes its best row that nobody has taken. With
    "maxmin", the turn goes to the target that is served worst so far: scores are standardised per target (mean 0 and
    standard deviation 1 over the eligible rows), and what a target has is their sum over all rows taken so far, by
    whichever target. A row that serves two targets thus leaves the turns to a third. This is greedy: it raises the
    minimum over targets step by step, and does not find the best set.

    Args:
        how: An entry of `SHARINGS`.
        scores: [n, t], what each row is worth to each target; higher is better, finite where rows are eligible.
        names: [t], the targets.
        candidates: The rows; ties go to the smaller key.
        budget: How much to choose for all together.
        budgets: Target -> its own budget, in rows or as a share of the pool, in place of `budget`; a target then takes
            no more turns when it has as many rows. One for each target.
        max_per_source: A cap per source, see `fill`.

    Returns:
        The selection in the order of the turns; the reason of a row names its target.

    Raises:
        UsageError: An unknown name, budgets that do not fit the targets, or that the pool cannot fill.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c", "d"])
        >>> scores = torch.tensor([[9.0, 0.0], [8.0, 0.0], [7.0, 0.0], [0.0, 5.0]])
        >>> several("union", scores, ["x", "y"], pool, 3).indices.tolist()
        [0, 3, 1]
        >>> several("union", scores, ["x", "y"], pool, 1, budgets={"x": 3, "y": 1}).indices.tolist()
        [0, 3, 1, 2]
    """
    if how not in SHARINGS:
        raise UsageError(f"targets cannot share by '{how}'{did_you_mean(how, SHARINGS)}")
    for column in scores.T:
        require_finite(column, candidates.keys, "scores of a target", where=candidates.eligible)
    rows = candidates.order(np.zeros(len(candidates)))  # the eligible ones, by key
    values = scores[torch.from_numpy(rows)].float().numpy()
    wanted = _rows_for_each(names, candidates, budgets)
    taker = {int(rows[place]): target for place, target in _turns(how, values, wanted)}
    chosen = list(taker)
    if wanted is None:
        budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
        chosen = fill(np.asarray(chosen, dtype=np.int64), candidates, budget, max_per_source)
    elif max_per_source is not None:
        raise UsageError("max_per_source caps one budget, and every target has one of its own; leave one of them out")
    elif len(chosen) < sum(wanted):
        raise UsageError(
            f"the budgets of the targets are {sum(wanted)} rows together, and {len(rows)} may be selected; ask for less"
        )
    why = [f"taken for target {names[taker[row]]}, score {float(scores[row, taker[row]]):.4g}" for row in chosen]
    return Selection(torch.tensor(chosen, dtype=torch.int64), scores=candidates.scores, why=why)


def _turns(how: str, values: NDArray[np.float32], wanted: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    """(row, target) of each turn, until no row is left, or no target wants one."""
    n, targets = values.shape
    queues = [Queue(values[:, target]) for target in range(targets)]
    used = np.zeros(n, dtype=np.bool_)
    spread = values.std(0)
    standard = (values - values.mean(0)) / np.where(spread > 0, spread, 1)
    has, left = np.zeros(targets), [n] * targets if wanted is None else list(wanted)
    last = -1
    for _ in range(n):
        asking = [target for target in range(targets) if left[target]]
        if not asking:
            return
        after = next((target for target in asking if target > last), asking[0])
        target = last = min(asking, key=lambda t: (has[t], t)) if how == "maxmin" else after
        row = queues[target].take(used)
        has += standard[row]
        left[target] -= 1
        yield row, target


def _rows_for_each(
    names: Sequence[str], candidates: Candidates, budgets: Mapping[str, str | int] | None
) -> list[int] | None:
    """How many rows each target asks for."""
    if not budgets:
        return None
    for name in budgets:
        if name not in names:
            raise UsageError(f"budgets: there is no target '{name}'{did_you_mean(name, names)}")
    if missing := [name for name in names if name not in budgets]:
        raise UsageError(f"budgets: target '{missing[0]}' has none; give one to each of {', '.join(names)}")
    found = []
    for name in names:
        limit = Budget.parse(budgets[name]).resolve(candidates)
        if limit.rows is None:
            raise UsageError(f"budgets: that of '{name}' is in tokens; give rows ('50') or a share ('5%')")
        found.append(limit.rows)
    return found
