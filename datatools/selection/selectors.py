"""Selectors: candidates and a budget go in, a `Selection` comes out. `SELECTORS` is the table by name."""

from dataclasses import dataclass
from typing import Protocol

from datatools.errors import UsageError, did_you_mean
from datatools.selection.bids import bids
from datatools.selection.budget import Budget
from datatools.selection.candidates import Candidates, Selection
from datatools.selection.random import random
from datatools.selection.random_length import random_length
from datatools.selection.round_robin import round_robin
from datatools.selection.top_k import top_k

__all__ = ["SELECTORS", "Selector", "bids", "random", "random_length", "round_robin", "select", "top_k"]


class Choose(Protocol):
    """The function of a selector; it ignores the arguments that mean nothing to it."""

    def __call__(
        self,
        candidates: Candidates,
        budget: Budget,
        *,
        seed: int = 0,
        max_per_source: str | float | None = None,
        reference: Selection | None = None,
    ) -> Selection:
        """Choose within `budget`, at most `max_per_source` (see `fill`) from each source."""


@dataclass(frozen=True)
class Selector:
    """One entry of `SELECTORS`: a function, described by its docstring, and what it needs.

    Attributes:
        choose: the function.
        scores: whether the candidates must have scores.
        reference: whether it needs a reference selection, as `random_length` does for its answer lengths.
        similarity: whether the candidates must have a similarity to target rows.
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
    """Choose rows with the selector called `name`.

    Args:
        name: an entry of `SELECTORS`.
        candidates: the rows.
        budget: how much to choose; text and numbers are parsed by `Budget.parse`.
        seed: of the selectors that draw at random.
        max_per_source: a cap per source, see `fill`.
        reference: a selection of the same rows that `random_length` imitates.

    Raises:
        UsageError: for an unknown name, a budget that the pool cannot fill, and what the selector needs and lacks.

    >>> pool = Candidates(keys=["a", "b", "c"], scores=[0.1, 0.9, 0.5])
    >>> select("top_k", pool, 2).indices.tolist()
    [1, 2]
    """
    if name not in SELECTORS:
        raise UsageError(f"there is no selector '{name}'{did_you_mean(name, SELECTORS)}")
    budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
    return SELECTORS[name].choose(candidates, budget, seed=seed, max_per_source=max_per_source, reference=reference)
