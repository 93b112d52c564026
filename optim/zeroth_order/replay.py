"""One step's record, and its evaluations: computed, or taken from a record that is replayed."""

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
"""A function that computes the loss, a number or a tensor of one; or several (micro-batches) whose sum is the loss."""


@dataclass(frozen=True)
class Taken:
    """The record of one step: enough to take it again on other weights (`ZerothOrder.replay`), in some 12 bytes.

    Args:
        step: The number of the step.
        seeds: One per direction, blocks outermost.
        projected_grad: One per direction, blocks outermost.
        kept: Which candidate p + kept * lr * g a conservative step chose, -1, 0 or 1; otherwise -1.
        losses: Every evaluation, in call order.

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
    """A loss or a gradient that is not finite (`value`): the step was not taken."""

    def __init__(self, text: str, value: float) -> None:
        super().__init__(text)
        self.value = value


@dataclass(frozen=True)
class Query:
    """One direction of a step: its block, seed and number within the block, and the projected gradient along it."""

    block: str
    seed: int
    number: int
    projected: float


class Evaluations:
    """The losses of one step, in call order; none are computed where the step is a recorded one."""

    def __init__(
        self, refused: Callable[[str, str, float], NotFinite], parts: Sequence[Loss], recorded: Taken | None
    ) -> None:
        self.refused, self.parts, self.recorded = refused, parts, recorded
        self.losses: list[float] = []
        self.present: float | None = None  # the loss at the weights that all directions start from, once it is known
        self.seeds: list[int] = []
        self.projected: list[float] = []

    def evaluate(self, where: str, *, or_else: float | None = None) -> float:
        """The loss at the weights as they are; 0 where the step is a recorded one. where: for the error."""
        if self.recorded is not None:
            return 0.0
        return self.note(sum(_value(part()) for part in self.parts), where, or_else)

    def at_present_weights(self) -> float:
        """Evaluated once, until `present` is forgotten."""
        if self.present is None:
            self.present = self.evaluate("the present weights")
        return self.present

    def note(self, loss: float, where: str, or_else: float | None = None) -> float:
        """Record a loss, as its mean over ranks, and return it. or_else: what stands for a loss that is not finite."""
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
    """The mean of the ranks' values, the same bits on every one of them."""
    if rank_count() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return float(shared) / rank_count()
