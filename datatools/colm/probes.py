"""Derivatives of each row's loss along random directions, by forward-mode passes through the last layer alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datatools.colm.exact import exact_gradients
from datatools.colm.feature import FeatureKind
from datatools.colm.replay import loss_of, replaying
from datatools.colm.target import Target
from datatools.gradients import Batch, Loss


def directional_derivatives(
    model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, chunk: int = 8
) -> Tensor:
    """z_k . gradient_i for directions z [K, *shape]: [b, K] float32, by forward-mode passes through the last layer.

    Inside `evaluating`.

    Exact up to rounding, and without the cancellation of differences of losses, which bfloat16 does not survive.
    chunk: directions at a time; memory is that of so many forward passes of one layer and the head. Models with an
    operation that torch has no forward derivative of, or cannot batch, get the products of `exact_gradients`.
    """
    if target.forwards:
        try:
            with replaying(model, losses, batch, target):
                return torch.cat([slopes(model, losses, batch, target, z) for z in torch.split(directions, chunk)], 1)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):  # an operation of this batch that the few tokens did not meet
            pass
    grads = exact_gradients(model, losses, batch, target)
    return torch.einsum("bij,kij->bk", grads, directions.to(grads))


def slopes(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor) -> Tensor:
    """[b, K] float32 for directions [K, *shape] at a time, by forward-mode passes of what the model runs."""
    value, loss = target.parameter.detach(), loss_of(model, losses, batch, target)

    def along(direction: Tensor) -> Tensor:
        slope: Tensor = torch.func.jvp(loss, (value,), (direction,))[1]
        return slope

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found: Tensor = torch.vmap(along)(torch.stack([target.embed(z) for z in directions]))
    return found.mT.float()


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    # scaled so that inner products of features are unbiased estimates of those of gradients
    scale: float = len(directions) ** 0.5
    return directional_derivatives(model, losses, batch, target, directions) / scale


PROBES = FeatureKind(
    name="probes",
    title="derivatives along random directions (`probes`)",
    measure=_measure,
    cost="a forward pass, and `probes` forward passes of the last layer and the head",
    directions=lambda probes: probes,
)
