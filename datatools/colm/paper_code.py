"""CoLM's published feature: one direction for the whole run, times its central difference of losses."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from datatools.colm.feature import FeatureKind
from datatools.colm.replay import loss_of, replaying
from datatools.colm.target import Target
from datatools.gradients import Batch, Loss


def central_differences(
    model: nn.Module,
    losses: Loss,
    batch: Batch,
    target: Target,
    direction: Float[Tensor, "outputs inputs"],
    *,
    eps: float = 1e-3,
) -> Float32[Tensor, " b"]:
    """Compute (L(w + eps z) - L(w - eps z)) / (2 eps) of each row's loss L for one direction z.

    This takes two replays of the last layer. Call it inside `evaluating`.

    Args:
        model: the model that contains the target.
        losses: (model, batch) -> mean loss of each row, floating dtype [b].
        batch: inputs of b rows.
        target: the matrix w.
        direction: z, floating dtype [outputs, inputs].
        eps: step of the difference.

    Returns:
        float32 [b].

    Source:
        CoLM, arXiv 2407.19580, equation 3 (SPSA), as its published code computes it.

    """
    value, move = target.parameter.detach(), eps * target.embed(direction)
    with torch.no_grad(), replaying(model, losses, batch, target):
        loss = loss_of(model, losses, batch, target)
        up, down = loss(value + move), loss(value - move)
    return ((up.double() - down.double()) / (2 * eps)).float()


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    return central_differences(model, losses, batch, target, directions[0], eps=eps)[:, None]


PAPER_CODE = FeatureKind(
    name="paper_code",
    title="the published method: one direction for the whole run, times its central difference",
    measure=_measure,
    cost="two forward passes",
    directions=lambda probes: 1,
    one_direction=True,
)
