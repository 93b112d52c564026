"""The record of one step, and its evaluations, which are computed or taken from a record that is replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from optim.curvature.losses import rank_count

Loss: TypeAlias = Callable[[], Any]
Losses: TypeAlias = Loss | Sequence[Loss]
"""A function that computes the loss (a number, or a tensor with one element), or several functions (one per
micro-batch) whose sum is the loss."""


@dataclass(frozen=True)
class Taken:
    """The record of one step, in about 12 bytes, with which `ZerothOrder.replay` can repeat it on other weights.

    Args:
        step: The number of the step.
        seeds: The seed of each direction, ordered by block first.
        projected_grad: The projected gradient of each direction, ordered by block first.
        kept: The candidate p + kept * lr * g that a conservative step chose (-1, 0 or 1); otherwise -1.
        losses: All evaluated losses, in the order of the calls.

    Example:
        >>> from optim import SGD
        >>> from optim.zeroth_order import ZerothOrder
        >>> model = torch.nn.Linear(4, 1)
        >>> source, optimizer = ZerothOrder(model.named_parameters()), SGD(model.named_parameters(), lr=1e-2)
        >>> _ = source.step(optimizer, lambda: model(torch.ones(2, 4)).square().mean())
        >>> source.last.step, len(source.last.seeds), len(source.last.losses)
        (0, 1, 2)
    """

    step: int
    seeds: list[int]
    projected_grad: list[float]
    kept: int = -1
    losses: list[float] = field(default_factory=list)


class NotFinite(ValueError):
    """A loss or a gradient is not finite, so that the step was not taken.

    Args:
        text: The message.
        value: The loss, or NaN for a gradient.
    """

    def __init__(self, text: str, value: float) -> None:
        super().__init__(text)
        self.value = value


@dataclass(frozen=True)
class Query:
    """One direction of a step.

    Args:
        block: The block of parameters that it belongs to.
        seed: The seed of the direction.
        number: The number of the direction within the block.
        projected: The projected gradient along the direction.
    """

    block: str
    seed: int
    number: int
    projected: float


class Evaluations:
    """The losses of one step, in the order of the calls; none are computed if the step is replayed.

    Args:
        refused: A function that creates the error for a loss that is not finite.
        parts: Functions whose sum is the loss.
        recorded: The record of the step if it is replayed.
    """

    def __init__(
        self, refused: Callable[[str, str, float], NotFinite], parts: Sequence[Loss], recorded: Taken | None
    ) -> None:
        self.refused, self.parts, self.recorded = refused, parts, recorded
        self.losses: list[float] = []
        self.present: float | None = None  # the loss at the weights that all directions start from, once it is known
        self.seeds: list[int] = []
        self.projected: list[float] = []

    def evaluate(self, where: str, *, or_else: float | None = None) -> float:
        """Return the loss at the current weights.

        Args:
            where: A description of these weights for the error.
            or_else: The value that replaces a loss that is not finite; by default, it is an error.

        Returns:
            The loss; 0 if the step is replayed.

        Raises:
            NotFinite: If the loss is not finite.
        """
        if self.recorded is not None:
            return 0.0
        return self.note(sum(_value(part()) for part in self.parts), where, or_else)

    def at_present_weights(self) -> float:
        """Return the loss at the current weights, which is evaluated once until `present` is reset.

        Returns:
            The loss.
        """
        if self.present is None:
            self.present = self.evaluate("the current weights")
        return self.present

    def note(self, loss: float, where: str, or_else: float | None = None) -> float:
        """Record the mean of a loss over ranks.

        Args:
            loss: This rank's loss.
            where: A description of the weights for the error.
            or_else: The value that replaces a loss that is not finite; by default, it is an error.

        Returns:
            The mean.

        Raises:
            NotFinite: If the mean is not finite.
        """
        loss = mean_over_ranks(loss)
        if not math.isfinite(loss) and or_else is not None:
            loss = or_else
        elif not math.isfinite(loss):
            raise self.refused("loss", f"{loss} at {where}", loss)
        self.losses.append(loss)
        return loss


def _value(loss: Any) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def mean_over_ranks(value: float) -> float:
    """Return the mean of a value over the ranks, with the same bits on every rank.

    Args:
        value: This rank's value.

    Returns:
        The mean.
    """
    if rank_count() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return float(shared) / rank_count()
