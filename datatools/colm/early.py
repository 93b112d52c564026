"""Gradients as if the model ended after its first layers: features for a part of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from datatools.colm.feature import FeatureKind
from datatools.colm.layer_calls import blocks_of
from datatools.colm.target import Target
from datatools.errors import DataError
from datatools.gradients import Batch, Loss

PART = 4
"""One of so many decoder layers is run, rounded up."""
SIDE = 32
"""A feature is a matrix [32, 32]: a random projection of both sides of the gradient."""
_SEED = 20261130


def early_gradients(model: nn.Module, losses: Loss, batch: Batch, target: Target) -> Float32[Tensor, "b numbers"]:
    """Compute a sketch of each row's gradient in the model without its later layers. Call it inside `evaluating`.

    The model is run with its first quarter of layers, and then its final norm and its head as usual. Let h_t be the
    hidden states after these layers and l the row's loss. A linear map of these states that is the identity has the
    gradient G = sum_t (dl / dh_t) h_t^T. The sketch A^T G B has the same inner products on average, for A and B with
    independent normal entries of variance 1 / 32.

    Cost: a quarter of the decoder's forward pass, and a forward and a backward pass through the norm and the head.

    Args:
        model: the model.
        losses: (model, batch) -> the mean loss of each row, floating dtype [b].
        batch: inputs of b rows.
        target: the matrix of other kinds, whose `layers` say in which order layers are called.

    Returns:
        float32 [b, 1024].

    Raises:
        DataError: if the layers do not pass on hidden states [b, tokens, width].

    """
    count = -(-len(target.layers) // PART)
    seen: list[Tensor] = []
    with torch.no_grad(), _ending(model, target.layers[:count], seen):
        values = losses(model, batch)
        found = torch.autograd.grad(values.sum(), seen[-1:]) if seen else ()
    if not found or found[0].ndim != 3 or len(found[0]) != len(values):
        raise DataError(
            f"coreset: the layers of {type(model).__name__} pass on no hidden states [rows, tokens, width] that early "
            "features could read; use exact features"
        )
    h, g = seen[-1].detach().float(), found[0].float()
    generator = torch.Generator().manual_seed(_SEED)
    a, b = (torch.randn(h.shape[-1], SIDE, generator=generator).to(h.device) / SIDE**0.5 for _ in range(2))
    sketch: Tensor = ((g @ a).mT @ (h @ b)).flatten(1)
    return sketch


@contextmanager
def _ending(model: nn.Module, first: tuple[nn.Module, ...], seen: list[Tensor]) -> Iterator[None]:
    """Inside, decoder layers other than `first` pass on what they get; the graph begins at what `first` return."""
    form: list[Any] = []  # how a layer returns hidden states: alone, or in a tuple with more

    def capture(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(True)  # `no_grad` around the pass restores the mode
        states = output if isinstance(output, Tensor) else output[0]
        seen.append(states.detach().requires_grad_(True))
        form[:] = [output]
        return seen[-1] if isinstance(output, Tensor) else (seen[-1], *output[1:])

    def passing(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(form[0], Tensor) else (states, *form[0][1:])

    blocks = [(name.rpartition(".")[0], block) for name, block in blocks_of(model).items()]
    lists = {parent for parent, block in blocks if block is first[-1]}
    later = [b for parent, b in blocks if parent in lists and all(b is not one for one in first)]
    own = [(block, vars(block).get("forward")) for block in later]  # another library may have wrapped it
    handle = first[-1].register_forward_hook(capture)
    try:
        for block in later:
            block.forward = passing
        yield
    finally:
        handle.remove()
        for block, forward in own:
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    return early_gradients(model, losses, batch, target)


EARLY = FeatureKind(
    name="early",
    title="a sketch of the gradient in the model without its later layers",
    measure=_measure,
    cost="a quarter of a forward pass, and a pass through the head",
    width=lambda target: SIDE * SIDE,
    as_training=False,
)
