"""Selectors: candidates and a budget in, a `Selection` out. `SELECTORS` is the table by name."""

from collections.abc import Mapping
from typing import Protocol

from datatools.errors import UsageError, did_you_mean
from datatools.selection.candidates import Budget, Candidates, Selection
from datatools.selection.random import random
from datatools.selection.random_length import random_length
from datatools.selection.top_k import top_k

__all__ = ["SELECTORS", "Selector", "random", "random_length", "select", "top_k"]


class Selector(Protocol):
    """What every entry of `SELECTORS` is; a selector ignores the arguments that mean nothing to it."""

    def __call__(
        self,
        candidates: Candidates,
        budget: Budget,
        *,
        seed: int = 0,
        max_per_source: str | float | None = None,
        reference: Selection | None = None,
    ) -> Selection:
        """Choose within `budget`, at most `max_per_source` (see `candidates.fill`) of each source."""


SELECTORS: Mapping[str, Selector] = {"top_k": top_k, "random": random, "random_length": random_length}


def select(
    name: str,
    candidates: Candidates,
    budget: Budget | str | int,
    *,
    seed: int = 0,
    max_per_source: str | float | None = None,
    reference: Selection | None = None,
) -> Selection:
    """Run the selector called `name`; a `budget` that is text is parsed. Raises: UsageError for an unknown name."""
    if name not in SELECTORS:
        raise UsageError(f"there is no selector '{name}'{did_you_mean(name, SELECTORS)}")
    budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
    return SELECTORS[name](candidates, budget, seed=seed, max_per_source=max_per_source, reference=reference)
