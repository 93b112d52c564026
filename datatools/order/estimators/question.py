"""Properties of an order question that are known before anything is computed; costs and refusals follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from datatools.order.recipe import Recipe


class Settings(Protocol):
    """The settings that estimators read. `datatools order` passes its configuration, which includes them."""

    @property
    def anchors(self) -> int:
        """Number of anchors of the reference run."""
        ...

    @property
    def pairwise_anchors(self) -> int:
        """Number of anchors at which `pairwise` and a frozen `reduced` compute products."""
        ...

    @property
    def dimensions(self) -> int:
        """Number of directions to which `reduced` without rows reduces Hessians."""
        ...

    @property
    def second_moment(self) -> str:
        """Second moment of `reduced`: own, expected or anchor."""
        ...

    @property
    def sample_rows(self) -> int:
        """Number of rows of each batch whose gradients `reduced` recomputes for each score."""
        ...

    @property
    def products(self) -> str:
        """How Hessian-vector products are computed."""
        ...

    @property
    def table_projection(self) -> int:
        """Dimension to which `table` projects each update term; 0 stores it whole."""
        ...

    @property
    def seed(self) -> int:
        """Seed of random projections."""
        ...


@dataclass(frozen=True)
class Question:
    """The sizes of an order question, and how the run trains.

    Args:
        steps: T, the steps of the run.
        batches: n, the number of different training batches.
        batch_size: rows per batch.
        held_out: number of held-out batches.
        parameters: p, the number of trained parameters.
        share: cost of the gradient of a batch's sample, in gradients of a batch (`Problem.share`).
        sources: the source of each batch.
        recipe: how the run trains.
        settings: settings of the estimators.

    Example:
        >>> from types import SimpleNamespace
        >>> from datatools.order import estimator
        >>> from datatools.order.example import example_run
        >>> recipe, settings = example_run()[1].recipe, SimpleNamespace(anchors=3, pairwise_anchors=2)
        >>> estimator("pairwise").expected(Question(4, 4, 8, 1, 3, 1.0, ["web"] * 4, recipe, settings)).hvps
        8

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
