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
    """A loss or gradient is not finite: training has diverged.

    Example:
        >>> from datatools.errors import DataError
        >>> issubclass(Diverged, DataError)
        True

    """


class Parts(tuple[Any, ...]):
    """A batch in parts (micro-batches) whose losses add up to its loss, so that only one part's graph is in memory.

    Example:
        >>> def loss(params, x):
        ...     return (params["w"] * x).sum()
        >>> problem = Problem(loss, [Parts((torch.ones(2), torch.ones(3)))], [torch.ones(1)])
        >>> problem.gradient({"w": torch.zeros(())}, 0)["w"].item()
        5.0

    """

    __slots__ = ()


HVP_IN_GRADIENTS = 4.0
"""Cost of a Hessian-vector product in batch gradients, for planning (spec B.2: 2 to 4; the upper end)."""


@dataclass
class Cost:
    """The cost of an estimate, in passes over one batch and in memory.

    Attributes:
        gradients: number of gradients, which are the unit of cost.
        hvps: number of Hessian-vector products.
        forwards: number of forward passes, which count as a third of a gradient.
        bytes: the largest block of memory, in bytes.

    Example:
        >>> Cost(gradients=10, hvps=2, forwards=3).in_gradients(hvp=3.0)
        17.0

    """

    gradients: float = 0
    hvps: int = 0
    forwards: int = 0
    bytes: int = 0

    def in_gradients(self, *, hvp: float = 3.0) -> float:
        """Convert the cost to batch gradients.

        Args:
            hvp: cost of a Hessian-vector product in gradients (2 to 4; spec B.2).

        Returns:
            Batch-gradient equivalents.

        """
        return self.gradients + hvp * self.hvps + self.forwards / 3


@dataclass
class Problem:
    """The data of an order question: n training batches, held-out batches, and one loss for both.

    Args:
        loss: (parameters, batch) -> the mean loss of the batch, 0-d.
        batches: n training batches of any type that the loss accepts, or `Parts` of such.
        validation: held-out batches of the same types.
        weights: weights of the held-out batches, such as their numbers of tokens; equal by default.
        samples: for each training batch, some of its rows as a batch, whose gradients change with the parameters as
            those of the batch do (for the estimator `reduced`).
        share: cost of the gradient of a sample, in gradients of a batch.
        hvp_method: "auto", "exact" or "difference" as in `optim.curvature.hvp`, or "gauss-newton" for products with
            that matrix instead of the Hessian (`curvature.gauss_newton_product`).
        cost: increased by every call, so that estimators can report their cost.
        spent: called after each gradient or product of a training batch has been counted, for a progress bar.

    Raises:
        UsageError: if there are no batches.
        Diverged: (a DataError) by gradients, if a loss is not finite.

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
        """Compute the gradient of a training batch.

        Args:
            params: name -> [*shape], floating dtype.
            batch: number of the batch.

        Returns:
            Name -> gradient [*shape]; zero for parameters that the loss does not use.

        Raises:
            Diverged: if the loss or the gradient is not finite.

        """
        self._spend(gradients=1)
        return self._grad(params, self.batches[batch], f"batch {batch}")

    def sample_gradient(self, params: Params, batch: int) -> Params:
        """Compute the gradient of the sample of a training batch.

        Args:
            params: name -> [*shape], floating dtype.
            batch: number of the batch.

        Returns:
            Name -> gradient [*shape].

        Raises:
            UsageError: if the problem has no samples.
            Diverged: if the loss or the gradient is not finite.

        """
        if self.samples is None:
            raise UsageError("order: this estimate needs a few rows of every batch; pass Problem(samples=)")
        self._spend(gradients=self.share)
        return self._grad(params, self.samples[batch], f"the sample of batch {batch}")

    def held_out_gradient(self, params: Params) -> Params:
        """Compute the gradient of the held-out loss.

        Args:
            params: name -> [*shape], floating dtype.

        Returns:
            Name -> gradient [*shape].

        Raises:
            Diverged: if the loss or the gradient is not finite.

        """
        self.cost.gradients += len(self.validation)
        total: Params = {}
        for weight, batch in self._weighted():
            for name, grad in self._grad(params, batch, "a held-out batch").items():
                total[name] = weight * grad + total[name] if name in total else weight * grad
        return total

    def held_out_loss(self, params: Params) -> float:
        """Compute the weighted mean loss over the held-out batches.

        Args:
            params: name -> [*shape], floating dtype.

        Returns:
            The loss.

        """
        self.cost.forwards += len(self.validation)
        with torch.no_grad():
            return math.fsum(weight * self._value(params, batch) for weight, batch in self._weighted())

    def train_loss(self, params: Params, batch: int) -> float:
        """Compute the loss of a training batch.

        Args:
            params: name -> [*shape], floating dtype.
            batch: number of the batch.

        Returns:
            The loss.

        """
        self.cost.forwards += 1
        with torch.no_grad():
            return self._value(params, self.batches[batch])

    def hvp(self, params: Params, batch: int, vector: Params) -> Params:
        """Compute the Hessian-vector product H v of a training batch.

        Args:
            params: name -> [*shape], floating dtype.
            batch: number of the batch.
            vector: v, name -> [*shape].

        Returns:
            H v, name -> [*shape].

        """
        self._spend(hvps=1)
        return self._hvp(params, self.batches[batch], vector)

    def held_out_hvp(self, params: Params, vector: Params) -> Params:
        """Compute the Hessian-vector product H v of the held-out loss.

        Args:
            params: name -> [*shape], floating dtype.
            vector: v, name -> [*shape].

        Returns:
            H v, name -> [*shape].

        """
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
        for part in _parts(data):  # summed in the same order as by `backward` of one micro-batch after the other
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
                    f"order: the loss of {what} has no gradient with respect to the parameters: a kernel of the model "
                    "has no backward pass, or the loss was detached; use attention 'sdpa' or 'eager', and no inference "
                    "mode"
                )
            curvature.graph_leaves(loss)  # refuses a graph that hides parameters
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in grads if g is not None):
            raise Diverged(
                f"order: the gradient of {what} is not finite, although its loss is ({float(loss.detach()):.4g}); no "
                "step of a run can be skipped. Lower the learning rate, or inspect these rows"
            )
        return {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), grads, strict=True)
        }


def _parts(data: Any) -> tuple[Any, ...]:
    return data if isinstance(data, Parts) else (data,)


def check_repeatable(problem: Problem, params: Params, batch: int) -> None:
    """Refuse a loss that is random, for example because of dropout or data that is drawn anew.

    Every estimate differentiates one loss, which must be the same function at each call.

    Args:
        problem: the problem.
        params: name -> [*shape], floating dtype.
        batch: number of the batch whose loss is computed twice.

    Raises:
        DataError: if the two losses differ.

    """
    first, again = problem.train_loss(params, batch), problem.train_loss(params, batch)
    if first != again and not (math.isnan(first) and math.isnan(again)):
        raise DataError(
            f"order: the loss of batch {batch} is {first!r}, but {again!r} when computed again, so it is random "
            "(dropout?). Put the model in eval mode, and set dropout to 0"
        )
