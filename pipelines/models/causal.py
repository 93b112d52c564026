"""A check that a model meets the assumptions of every batch, tried on eight tokens when the model is opened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datatools import DataError
from pipelines.models import quantized
from pipelines.texts import first_line

_TOKENS, _SEEN = 8, 5


def check(model: nn.Module, name: str) -> None:
    """Refuse a model whose logits depend on later tokens or other rows, or that cannot be differentiated.

    Rows of a batch are padded on the right without a mask, which is exact only for a decoder that looks back.

    Args:
        model: The model.
        name: The name of the model, for messages.

    Raises:
        DataError: The model cannot be used; the message names its class and an alternative.
    """
    quantized.prepare(model, name)
    kind = type(model).__name__
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = (torch.arange(1, _TOKENS + 1, device=device) * max(1, vocabulary // (_TOKENS + 2)))[None] % vocabulary
    other = ids.clone()
    other[:, _SEEN:] = (ids[:, _SEEN:] + 1) % vocabulary
    modules = [id(module) for module in model.modules()]
    try:
        logits = _differentiable(model, ids)
        with torch.no_grad():
            changed, cut = (model(input_ids=part, use_cache=False).logits for part in (other, ids[:, :_SEEN]))
    except Exception as error:  # whatever the model's code raises, it cannot be used here
        raise DataError(
            f"--model {name}: {kind} cannot be run and differentiated on token ids alone "
            f"({type(error).__name__}: {first_line(error)}); choose a causal decoder of text"
        ) from error
    if [id(module) for module in model.modules()] != modules:
        raise DataError(
            f"--model {name}: {kind} permanently replaces its attention after a short row; set "
            "attention_type to original_full in its config.json"
        )
    if logits.shape[:2] != ids.shape:
        raise DataError(f"--model {name}: {kind} returns logits {tuple(logits.shape)} for {tuple(ids.shape)} tokens")
    limit = (1e-4 if logits.dtype in (torch.float32, torch.float64) else 0.1) * float(logits.abs().max())
    for what, found in (("the tokens after", changed), ("the number of tokens after", cut)):
        off = float((found[:, :_SEEN].float() - logits[:, :_SEEN].float()).abs().max())
        if off > limit:
            advice = "set is_decoder to true in its config.json" if _is_encoder(model) else "choose a causal decoder"
            raise DataError(
                f"--model {name}: {kind} is not causal: the logits of a token change with {what} it (by {off:.2g}, of "
                f"{float(logits.abs().max()):.2g}), so the losses of padded rows would be wrong; {advice}"
            )


def _differentiable(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits, after a gradient has been propagated from them to the embeddings."""

    def begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        # a copy, because some models write into the output of the embeddings
        return output if output.requires_grad else output.detach().requires_grad_(True).clone()

    with torch.enable_grad():
        handle = model.get_input_embeddings().register_forward_hook(begin)  # type: ignore[operator]
        try:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        logits.float().sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach()


def _is_encoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_decoder", None) is False
