"""The record of a kind of feature: what is measured of each row for a coreset method to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from datatools.colm.target import Target
from datatools.gradients import Batch, Loss


class Measure(Protocol):
    """Signature of the function of a kind of feature; it is called inside `evaluating`."""

    def __call__(
        self, model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float
    ) -> Tensor:
        """Measure the b rows of `batch`.

        Args:
            model: the model that is trained.
            losses: (model, batch) -> the mean loss of each row, floating dtype [b].
            batch: inputs of b rows.
            target: the matrix, of shape [outputs, inputs].
            directions: random, float32 [K, outputs, inputs]; K is the kind's `directions`.
            eps: step of finite differences.

        Returns:
            float32 [b, outputs, inputs] for a kind that is `exact`, [b, K] for others.

        """


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """One entry of `datatools.CORESET_FEATURES`.

    Attributes:
        name: value of the setting `coreset.features`.
        title: description for the documentation.
        measure: the function that measures.
        cost: its cost, in passes.
        directions: setting `probes` -> number of random directions.
        exact: whether it measures the gradient itself, from which matching errors can be computed.
        one_direction: whether the direction is the same in the whole run, and the feature is the direction times the
            measured number.
        as_training: whether a row costs about as much time as training on it; False means about one forward pass.

    Example:
        >>> from datatools import CORESET_FEATURES
        >>> CORESET_FEATURES["probes"].directions(64), CORESET_FEATURES["paper_code"].directions(64)
        (64, 1)

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
        """Return the shape of what is measured of one row.

        Args:
            target: the matrix.
            probes: the setting of that name.

        Returns:
            The shape.

        """
        return target.shape if self.exact else (self.directions(probes),)

    def shape(self, target: Target, probes: int) -> tuple[int, ...]:
        """Return the shape of the feature of one row.

        Args:
            target: the matrix.
            probes: the setting of that name.

        Returns:
            The shape.

        """
        return target.shape if self.one_direction else self.measured(target, probes)
