"""The data of an order question: training batches, held-out batches, and one loss over named tensors for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from datatools.errors import DataError, UsageError
from optim import curvature

Params: TypeAlias = dict[str, Tensor]
"""Parameters, gradients or displacements: name -> [*shape]."""


Loss: TypeAlias = Callable[[Params, Any], Tensor]
"""(parameters, batch) -> mean loss of the batch, 0-d, differentiable in the parameters."""


class Diverged(DataError):
    """A loss that is not finite: training has left what the model can compute."""


class Parts(tuple[Any, ...]):
    """A batch in parts (micro-batches), whose losses add up to the batch's: only one part's graph is held at a time."""

    __slots__ = ()


HVP_IN_GRADIENTS = 4.0
"""What a Hessian-vector product costs in batch gradients, for plans (spec B.2: 2 to 4; the upper end)."""


@dataclass
class Cost:
    """What an estimator spent: passes over one batch. A gradient is the unit; forward passes count a third of it."""

    gradients: float = 0
    hvps: int = 0
    forwards: int = 0
    bytes: int = 0

    def in_gradients(self, *, hvp: float = 3.0) -> float:
        """Batch-gradient equivalents, a Hessian-vector product being `hvp` of them (2 to 4; spec B.2)."""
        return self.gradients + hvp * self.hvps + self.forwards / 3


@dataclass
class Problem:
    """The data of an order question: n training batches, held-out batches, one loss for both.

    Args:
        loss: (parameters, batch) -> the mean loss of the batch, 0-d.
        batches: n training batches, of any kind that the loss takes, or `Parts` of such.
        validation: held-out batches, likewise.
        weights: of the held-out batches, such as their numbers of tokens; equal unless given.
        samples: for each training batch a part of its rows, as a batch of its own, whose gradients change as those of
            the batch do when parameters move (the estimator `reduced`).
        share: the cost of the gradient of a sample, in gradients of a batch.
        hvp_method: "auto", "exact" or "difference" as in `optim.curvature.hvp`, or "gauss-newton" for products with
            that matrix in place of the Hessian (`curvature.gauss_newton_product`).
        cost: counted up by every call, so that estimators can say what they spent.
        spent: called after each gradient or product of a training batch has been counted, for a progress bar.

    Raises:
        UsageError: for no batches.
        Diverged: (a DataError) for a gradient of a loss that is not finite.

    Example:
        >>> problem = Problem(lambda params, batch: (params["w"] * batch).sum(), [torch.ones(2)], [torch.ones(1)])
        >>> problem.gradient({"w": torch.zeros(())}, 0)["w"].item()
        2.0
    """

    loss: Loss
    batches: Sequence[Any]
    validation: Sequence[Any]
    weights: Sequence[float] | None = None
    samples: Sequence[Any] | None = None
    share: float = 1.0
    hvp_method: str = "auto"
    cost: Cost = field(default_factory=Cost)
    spent: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        if not len(self.batches) or not len(self.validation):
            raise UsageError("order: a problem needs training batches and held-out batches")

    def gradient(self, params: Params, batch: int) -> Params:
        """The gradient of training batch `batch` at `params`; a parameter that the loss misses has zero."""
        self._spend(gradients=1)
        return self._grad(params, self.batches[batch], f"batch {batch}")

    def sample_gradient(self, params: Params, batch: int) -> Params:
        """The gradient of the sample of training batch `batch`.

        Raises:
            UsageError: for a problem without samples.
        """
        if self.samples is None:
            raise UsageError("order: this estimate needs Problem(samples=): a few rows of every batch")
        self._spend(gradients=self.share)
        return self._grad(params, self.samples[batch], f"the sample of batch {batch}")

    def held_out_gradient(self, params: Params) -> Params:
        """The gradient of the held-out loss."""
        self.cost.gradients += len(self.validation)
        total: Params = {}
        for weight, batch in self._weighted():
            for name, grad in self._grad(params, batch, "a held-out batch").items():
                total[name] = weight * grad + total[name] if name in total else weight * grad
        return total

    def held_out_loss(self, params: Params) -> float:
        """The weighted mean loss over the held-out batches."""
        self.cost.forwards += len(self.validation)
        with torch.no_grad():
            return math.fsum(weight * self._value(params, batch) for weight, batch in self._weighted())

    def train_loss(self, params: Params, batch: int) -> float:
        """The loss of training batch `batch`."""
        self.cost.forwards += 1
        with torch.no_grad():
            return self._value(params, self.batches[batch])

    def hvp(self, params: Params, batch: int, vector: Params) -> Params:
        """H v of training batch `batch` at `params`."""
        self._spend(hvps=1)
        return self._hvp(params, self.batches[batch], vector)

    def held_out_hvp(self, params: Params, vector: Params) -> Params:
        """H v of the held-out loss."""
        self.cost.hvps += len(self.validation)
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for weight, batch in self._weighted():
            product = self._hvp(params, batch, vector)
            total = {name: t + weight * product[name] for name, t in total.items()}
        return total

    def _spend(self, gradients: float = 0, hvps: int = 0) -> None:
        self.cost.gradients += gradients
        self.cost.hvps += hvps
        if self.spent is not None:
            self.spent()

    def _hvp(self, params: Params, data: Any, vector: Params) -> Params:
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        losses = [partial(self.loss, leaves, part) for part in _parts(data)]
        along = [vector[name].to(p.dtype) for name, p in leaves.items()]
        if self.hvp_method == "gauss-newton":
            try:
                products = [curvature.gauss_newton_product(loss, list(leaves.values()), along) for loss in losses]
            except curvature.NoCrossEntropy as error:
                raise UsageError(f"order: {str(error).removeprefix('curvature: ')}. Use hvp_method 'auto'") from error
            return {name: torch.stack(parts).sum(0) for name, *parts in zip(leaves, *products, strict=True)}
        found = curvature.hvp(losses, list(leaves.values()), along, method=self.hvp_method)
        return {
            name: torch.zeros_like(p) if h is None else h.detach()
            for (name, p), h in zip(leaves.items(), found, strict=True)
        }

    def _weighted(self) -> Iterator[tuple[float, Any]]:
        weights = self.weights if self.weights is not None else [1.0] * len(self.validation)
        total = math.fsum(weights)
        for weight, batch in zip(weights, self.validation, strict=True):
            yield weight / total, batch

    def _value(self, params: Params, data: Any) -> float:
        return math.fsum(float(self.loss(params, part)) for part in _parts(data))

    def _grad(self, params: Params, data: Any, what: str) -> Params:
        total: Params = {}
        for part in _parts(data):  # as `backward` of one micro-batch after the other adds them up
            for name, grad in self._part_grad(params, part, what).items():
                total[name] = total[name] + grad if name in total else grad
        return total

    def _part_grad(self, params: Params, data: Any, what: str) -> Params:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            loss = self.loss(leaves, data)
            if not bool(loss.isfinite()):
                raise Diverged(f"order: the loss of {what} is {float(loss.detach())}; lower the learning rate")
            if not loss.requires_grad:
                raise UsageError(
                    f"order: the loss of {what} cannot be differentiated in the parameters: a kernel of the model has "
                    "no backward, or the loss was detached; use attention 'sdpa' or 'eager', and no inference mode"
                )
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in grads if g is not None):
            raise Diverged(
                f"order: the gradient of {what} is not finite, though its loss is ({float(loss.detach()):.4g}); a run "
                "of all its steps cannot leave one out. Lower the learning rate, or look at these rows"
            )
        return {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), grads, strict=True)
        }


def _parts(data: Any) -> tuple[Any, ...]:
    return data if isinstance(data, Parts) else (data,)


def check_repeatable(problem: Problem, params: Params, batch: int) -> None:
    """Raise DataError when the loss is not the same twice: dropout, or data drawn anew. Every estimate differentiates
    one loss, and a random one would be another at each call.
    """
    first, again = problem.train_loss(params, batch), problem.train_loss(params, batch)
    if first != again and not (math.isnan(first) and math.isnan(again)):
        raise DataError(
            f"order: the loss of batch {batch} is {first!r}, and {again!r} when computed again: it is random (dropout "
            "is on?). Put the model in eval mode, and set dropout to 0"
        )
