"""Selectors: functions from candidates and a budget to a `Selection`. `SELECTORS` is the table by name."""

from dataclasses import dataclass
from typing import Protocol

from datatools.errors import UsageError, did_you_mean
from datatools.selection.bids import bids
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.coverage import coverage
from datatools.selection.random import random
from datatools.selection.random_length import random_length
from datatools.selection.round_robin import round_robin
from datatools.selection.top_k import top_k

__all__ = ["SELECTORS", "Selector", "bids", "coverage", "random", "random_length", "round_robin", "select", "top_k"]


class Choose(Protocol):
    """Signature of the function of a selector, which ignores the arguments that it does not use."""

    def __call__(
        self,
        candidates: Candidates,
        budget: Budget,
        *,
        seed: int = 0,
        max_per_source: str | float | None = None,
        reference: Selection | None = None,
    ) -> Selection:
        """Choose rows within `budget`, at most `max_per_source` (see `fill`) of each source."""


@dataclass(frozen=True)
class Selector:
    """One entry of `SELECTORS`: a function, described by its docstring, and what it needs.

    Attributes:
        choose: the function.
        scores: whether the candidates must have scores.
        reference: whether it needs a reference selection, as `random_length` does for its answer lengths.
        similarity: whether the candidates must have a similarity to target rows.

    Example:
        >>> SELECTORS["top_k"].scores, SELECTORS["random"].scores
        (True, False)

    """

    choose: Choose
    scores: bool = False
    reference: bool = False
    similarity: bool = False


SELECTORS: dict[str, Selector] = {
    "top_k": Selector(top_k, scores=True),
    "random": Selector(random),
    "random_length": Selector(random_length, reference=True),
    "round_robin": Selector(round_robin, similarity=True),
    "bids": Selector(bids, similarity=True),
    "coverage": Selector(coverage, similarity=True),
}


def select(
    name: str,
    candidates: Candidates,
    budget: Budget | str | int,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Choose rows with a selector.

    Args:
        name: a name of `SELECTORS`.
        candidates: the rows.
        budget: how much to choose; text and numbers are parsed by `Budget.parse`.
        seed: seed of selectors that draw at random.
        max_per_source: cap per source, see `fill`.
        reference: a selection from the same rows, which `random_length` imitates.

    Returns:
        The selection.

    Raises:
        UsageError: if the name is unknown, the pool cannot fill the budget, or the selector lacks an input.

    Example:
        >>> pool = Candidates(keys=["a", "b", "c"], scores=[0.1, 0.9, 0.5])
        >>> select("top_k", pool, 2).indices.tolist()
        [1, 2]

    """
    if name not in SELECTORS:
        raise UsageError(f"unknown selector '{name}'{did_you_mean(name, SELECTORS)}")
    budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
    return SELECTORS[name].choose(candidates, budget, seed=seed, max_per_source=max_per_source, reference=reference)
