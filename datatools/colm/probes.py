"""Derivatives of each row's loss along random directions, by forward-mode passes through the last layer only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datatools.colm.exact import exact_gradients
from datatools.colm.feature import FeatureKind
from datatools.colm.replay import loss_of, replaying
from datatools.colm.target import Target
from datatools.gradients import Batch, Loss


def directional_derivatives(
    model: nn.Module,
    losses: Loss,
    batch: Batch,
    target: Target,
    directions: Float[Tensor, "K outputs inputs"],
    *,
    chunk: int = 8,
) -> Float32[Tensor, "b K"]:
    """Compute z_k . gradient_i for directions z by forward-mode passes through the last layer, inside `evaluating`.

    The result is exact up to rounding, without the cancellation of loss differences, which is too large in bfloat16.
    Models with an operation for which torch has no forward derivative, or which it cannot batch, use `exact_gradients`
    instead.

    Args:
        model: the model that contains the target.
        losses: (model, batch) -> mean loss of each row, floating dtype [b].
        batch: inputs of b rows.
        target: the matrix.
        directions: z, floating dtype [K, outputs, inputs].
        chunk: directions per pass; memory is that of `chunk` forward passes of one layer and the head.

    Returns:
        float32 [b, K].

    """
    if target.forwards:
        try:
            with replaying(model, losses, batch, target):
                return torch.cat([slopes(model, losses, batch, target, z) for z in torch.split(directions, chunk)], 1)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):  # an operation that the trial on a few tokens did not use
            pass
    grads = exact_gradients(model, losses, batch, target)
    return torch.einsum("bij,kij->bk", grads, directions.to(grads))


def slopes(
    model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Float[Tensor, "K outputs inputs"]
) -> Float32[Tensor, "b K"]:
    """Compute directional derivatives for all directions at once, in forward mode.

    Args:
        model: the model that contains the target.
        losses: (model, batch) -> mean loss of each row, floating dtype [b].
        batch: inputs of b rows.
        target: the matrix.
        directions: floating dtype [K, outputs, inputs].

    Returns:
        float32 [b, K].

    """
    value, loss = target.parameter.detach(), loss_of(model, losses, batch, target)

    def along(direction: Tensor) -> Tensor:
        slope: Tensor = torch.func.jvp(loss, (value,), (direction,))[1]
        return slope

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found: Tensor = torch.vmap(along)(torch.stack([target.embed(z) for z in directions]))
    return found.mT.float()


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    # scaled so that inner products of features are unbiased estimates of inner products of gradients
    scale: float = len(directions) ** 0.5
    return directional_derivatives(model, losses, batch, target, directions) / scale


PROBES = FeatureKind(
    name="probes",
    title="derivatives along random directions (`probes`)",
    measure=_measure,
    cost="a forward pass, and `probes` forward passes of the last layer and the head",
    directions=lambda probes: probes,
)
