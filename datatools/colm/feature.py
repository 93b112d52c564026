"""What a kind of feature is: what is measured of each row for a coreset method to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from datatools.colm.target import Target
from datatools.gradients import Batch, Loss


class Measure(Protocol):
    """The function of a kind of feature; it runs inside `evaluating`."""

    def __call__(
        self, model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float
    ) -> Tensor:
        """What is measured of the b rows of `batch`.

        Args:
            model: The model that trains.
            losses: (model, batch) -> the mean loss of each row, [b].
            batch: The inputs of b rows.
            target: The matrix in question, of shape [outputs, inputs].
            directions: Float [K, outputs, inputs], random; K is the kind's `directions`.
            eps: The step of finite differences.

        Returns:
            Float32 [b, outputs, inputs] for a kind that is `exact`, [b, K] for others.
        """


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """One entry of `datatools.CORESET_FEATURES`.

    Attributes:
        name: What the setting `coreset.features` calls it.
        title: What it is, for the documentation.
        measure: The function.
        cost: What it costs, in passes.
        directions: The setting `probes` -> how many random directions it measures along.
        exact: Whether it measures the gradient itself; matching errors are then read off it.
        one_direction: Whether the direction is the same in the whole run, and the feature the measured number times it.
        as_training: Whether a row costs about as much time as training on it, rather than as much as a forward pass.
    """

    name: str
    title: str
    measure: Measure
    cost: str
    directions: Callable[[int], int] = lambda probes: 0
    exact: bool = False
    one_direction: bool = False
    as_training: bool = True

    def measured(self, target: Target, probes: int) -> tuple[int, ...]:
        """The shape of what is measured of a row."""
        return target.shape if self.exact else (self.directions(probes),)

    def shape(self, target: Target, probes: int) -> tuple[int, ...]:
        """The shape of a row's feature."""
        return target.shape if self.one_direction else self.measured(target, probes)
