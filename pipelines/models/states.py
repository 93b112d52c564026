"""Hidden states of a chosen layer and the losses of the same rows, from one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datatools import DataError
from pipelines.models.losses import Batch, last_states, row_losses

LAST = -1
"""The last layer, after the final norm: what the output head sees."""


def states_and_losses(model: Any, batch: Batch, layer: int = LAST) -> tuple[Tensor, Tensor]:
    """The hidden states of one layer, and the mean loss of each row.

    The states of the last layer are those of `last_states`, to the bit. A model whose decoder is not called as a module
    takes a second pass for them.

    Args:
        model: A causal language model.
        batch: b rows of s tokens.
        layer: 0 is the embeddings, 1 the first layer, and so on; -1 is the last layer, -2 the one before.

    Returns:
        States [b, s, width], in the model's dtype, and losses, float32 [b].

    Raises:
        DataError: The model returns no such states, or has no such layer.
    """
    seen: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda _, inputs, output: seen.append(output))
    asked: dict[str, Any] = {**batch} if layer == LAST else {**batch, "output_hidden_states": True}
    try:
        losses = row_losses(model, asked)
    finally:
        handle.remove()
    output = seen[-1] if seen else None
    if layer == LAST:
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != batch["input_ids"].shape:
            states = last_states(model, batch["input_ids"])
        return states, losses
    every = getattr(output, "hidden_states", None)
    if not every or not all(isinstance(one, Tensor) for one in every):
        raise DataError(
            f"features.layer={layer}: {type(model).__name__} does not return the hidden states of its layers; "
            f"features.layer={LAST} takes those of the last one"
        )
    if not -len(every) <= layer < len(every):
        raise DataError(
            f"features.layer={layer}: {type(model).__name__} has hidden states 0 (the embeddings) to {len(every) - 1} "
            f"(the last layer), or -1 to {-len(every)} from the end"
        )
    chosen: Tensor = every[layer]
    if chosen.shape[:2] != batch["input_ids"].shape:
        raise DataError(
            f"features.layer={layer}: {type(model).__name__} returns hidden states {list(chosen.shape)}, not one "
            f"vector per token; features.layer={LAST} takes those of the last layer"
        )
    return chosen, losses


def pooled(states: Tensor, labels: Tensor, lengths: Tensor, how: str) -> Tensor:
    """One vector per row.

    Args:
        states: [b, s, width], of any floating dtype.
        labels: int64 [b, s]; -100 where there is no loss.
        lengths: int64 [b], the tokens of each row; the rest is padding.
        how: `weighted` (mean with weights 1, 2, ..., s), `mean`, `last` (the last token), or `answer` (the mean over
            the tokens with loss).

    Returns:
        float32 [b, width].

    Raises:
        ValueError: For another name.
    """
    states = states.float()
    position = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=torch.float32)
    lengths = lengths.to(states.device)[:, None]
    real = position <= lengths
    weights = {
        "weighted": position * real,
        "mean": real.float(),
        "last": (position == lengths).float(),
        "answer": (labels != -100).float() * real,
    }
    if how not in weights:
        raise ValueError(f"pooling {how!r}; choose {', '.join(weights)}")
    weight = weights[how]
    return (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
