"""The record of one choice."""

from __future__ import annotations

from dataclasses import dataclass

from datatools.colm.quotas import Plan
from datatools.selection.candidates import Selection


@dataclass(frozen=True)
class Chosen:
    """One choice, its plan, and how well it matches the gradient of the large batch.

    Attributes:
        selection: the chosen rows.
        plan: which rows were kept anyway, and how many were chosen of each source.
        match_error: `matching_error` of the choice; None where it was not watched.
        match_error_random: `random_error` for the same plan; None where it was not watched.
        watch_seconds: time that measuring both errors took, apart from the choice itself.

    Example:
        >>> import torch
        >>> from datatools.colm import plan
        >>> made = plan(["web", "web"], 1, generator=torch.Generator())
        >>> Chosen(Selection(torch.tensor([0])), made).match_error is None
        True

    """

    selection: Selection
    plan: Plan
    match_error: float | None = None
    match_error_random: float | None = None
    watch_seconds: float = 0.0
