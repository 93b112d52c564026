"""Exact gradients of one matrix, one per row, by a backward pass through the last layer only."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from datatools.colm.feature import FeatureKind
from datatools.colm.target import Target
from datatools.errors import DataError
from datatools.gradients import Batch, Loss


def exact_gradients(
    model: nn.Module, losses: Loss, batch: Batch, target: Target
) -> Float32[Tensor, "b outputs inputs"]:
    """Compute the gradient of each row's loss with respect to the target's matrix. Call it inside `evaluating`.

    This takes one forward pass, and a backward pass from the losses to the output of the projection. Earlier layers
    keep no activations, even if the embeddings require gradients (`enable_input_require_grads`, which adapters with
    gradient checkpointing need). If the target is not a `product`, one backward pass per row is needed.

    Args:
        model: the model that contains the target.
        losses: (model, batch) -> mean loss of each row, floating dtype [b].
        batch: inputs of b rows.
        target: the matrix.

    Returns:
        float32 [b, outputs, inputs].

    Raises:
        DataError: if the forward pass does not call the target's layer.

    """
    if not target.product:
        return _row_by_row(model, losses, batch, target)
    calls: list[tuple[Tensor, Tensor]] = []  # shared layers are called several times

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        torch.set_grad_enabled(True)  # the graph begins here; `no_grad` below restores the mode
        y = output if output.requires_grad else output.detach().requires_grad_(True)
        calls.append((x.detach().clone(), y))  # copies, because some models change a layer's input and output in place
        return y.clone()

    with ExitStack() as hooks:
        for projection in target.sharing:
            hooks.callback(projection.register_forward_hook(capture, with_kwargs=True).remove)
        with torch.no_grad():
            values = losses(model, batch)
            found = torch.autograd.grad(values.sum(), [y for _, y in calls], allow_unused=True) if calls else ()
    if not calls:
        raise DataError(f"{type(model).__name__}: its forward pass does not call the layer of {target.name}")
    grads = torch.zeros(len(values), *target.shape, device=values.device)
    with torch.no_grad():
        for (x, _), g in zip(calls, found, strict=True):
            if g is not None:
                grads += target.contract(x, g).to(grads.device)
    return grads


def _row_by_row(model: nn.Module, losses: Loss, batch: Batch, target: Target) -> Tensor:
    """Compute the gradients by definition: one backward pass for each row's loss."""
    asked = target.parameter.requires_grad
    target.parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            values = losses(model, batch)
            found = [
                torch.autograd.grad(
                    value, target.parameter, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for value in values
            ]
    finally:
        target.parameter.requires_grad_(asked)
    return torch.stack([target.part(grad) for grad in found]).float()


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    return exact_gradients(model, losses, batch, target)


EXACT = FeatureKind(
    name="exact",
    title="the exact gradient of the last value projection",
    measure=_measure,
    cost="a forward pass, and a backward pass through the last layer and the head",
    exact=True,
    as_training=False,
)
