"""What is known of an order question before anything is computed: costs and refusals are worked out from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from datatools.order.recipe import Recipe


class Settings(Protocol):
    """The settings that estimators read. `datatools order` passes its configuration, which has these and more."""

    @property
    def anchors(self) -> int:
        """How many anchors the reference run has."""
        ...

    @property
    def pairwise_anchors(self) -> int:
        """Anchors at which `pairwise` and a frozen `reduced` take products."""
        ...

    @property
    def dimensions(self) -> int:
        """Directions to which `reduced` without rows reduces Hessians."""
        ...

    @property
    def second_moment(self) -> str:
        """Of `reduced`: own, expected or anchor."""
        ...

    @property
    def sample_rows(self) -> int:
        """Of `reduced`: rows of each batch whose gradients each score takes again."""
        ...

    @property
    def products(self) -> str:
        """How Hessian-vector products are taken."""
        ...

    @property
    def table_projection(self) -> int:
        """Of `table`: numbers to which each update term is projected; 0 keeps it whole."""
        ...

    @property
    def seed(self) -> int:
        """Of random projections."""
        ...


@dataclass(frozen=True)
class Question:
    """How much there is of everything, and how the run trains.

    Args:
        steps: T, the steps of the run.
        batches: n, the number of different training batches.
        batch_size: rows per batch.
        held_out: the number of held-out batches.
        parameters: p, how many numbers are trained.
        share: the cost of the gradient of a batch's sample, in gradients of a batch (`Problem.share`).
        sources: the source of each batch.
        recipe: how the run trains.
        settings: the settings of the estimators.

    """

    steps: int
    batches: int
    batch_size: int
    held_out: int
    parameters: int
    share: float
    sources: Sequence[str]
    recipe: Recipe
    settings: Settings
