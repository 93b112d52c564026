"""The record of a kind of feature: what is measured of each row for a coreset method to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float, Float32
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


def no_pass(
    model: nn.Module,
    losses: Loss,
    batch: Batch,
    target: Target,
    directions: Float32[Tensor, "K outputs inputs"],
    *,
    eps: float,
) -> Float[Tensor, "b ..."]:
    """Stand in for `Measure` where features are not measured by a pass.

    Args:
        model: ignored.
        losses: ignored.
        batch: ignored.
        target: ignored.
        directions: ignored.
        eps: ignored.

    Returns:
        Nothing.

    Raises:
        AssertionError: always.

    """
    raise AssertionError("these features are given, not measured")


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
        width: numbers per row of a kind that needs no random directions, from the matrix; 0 is one per direction.
        as_training: whether a row costs about as much time as training on it; False means about one forward pass.
        origin: where features come from: "pass", a pass over the large batch at each step; "store", features that were
            computed before training; "visit", by-products of the last training step that had the row. Features of the
            last two cost no pass, and are given to `CoLM.__call__`.

    Example:
        >>> from datatools import CORESET_FEATURES
        >>> CORESET_FEATURES["probes"].directions(64), CORESET_FEATURES["paper_code"].directions(64)
        (64, 1)

    """

    name: str
    title: str
    cost: str
    measure: Measure = no_pass
    directions: Callable[[int], int] = lambda probes: 0
    exact: bool = False
    one_direction: bool = False
    width: Callable[[Target], int] = lambda target: 0
    as_training: bool = True
    origin: Literal["pass", "store", "visit"] = "pass"

    @property
    def measures_gradients(self) -> bool:
        """Whether features are gradients, or derivatives along directions."""
        return self.exact or self.directions(1) > 0

    @property
    def free(self) -> bool:
        """Whether features cost no pass over the large batch."""
        return self.origin != "pass"

    def measured(self, target: Target, probes: int) -> tuple[int, ...]:
        """Return the shape of what is measured of one row.

        Args:
            target: the matrix.
            probes: the setting of that name.

        Returns:
            The shape.

        """
        return target.shape if self.exact else (self.width(target) or self.directions(probes),)

    def shape(self, target: Target, probes: int) -> tuple[int, ...]:
        """Return the shape of the feature of one row.

        Args:
            target: the matrix.
            probes: the setting of that name.

        Returns:
            The shape.

        """
        return target.shape if self.one_direction else self.measured(target, probes)
