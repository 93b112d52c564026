"""An adapter merged into the weights of its model: one plain model with the same logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datatools import DataError
from optim import Arrived
from pipelines.models import quantized
from pipelines.models.adapters import load_adapter, saved_parameters
from pipelines.models.base import unmarked
from pipelines.models.lora import logits
from pipelines.models.quiet import quiet
from pipelines.runs.messages import warn
from pipelines.texts import first_line

_LOST = 0.9  # a warning is given if a smaller share of an adapter's change is kept in merged weights


def merged(model: Any, folder: Path) -> Any:
    """Return a model with an adapter merged into its weights, as one plain model.

    If embedding and head share a weight and the adapter is on one of them, each gets its own weight. The logits of the
    merged model are compared with those of the adapted one. A warning is given if rounding to 16 bits loses much of
    the adapter.

    Args:
        model: The base model.
        folder: The folder of the adapter.

    Raises:
        DataError: As in `load_adapter`, or the adapter cannot be merged.
        UsageError: The weights are held in 4 or 8 bits.
    """
    quantized.refuse_merging(model, folder)
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=model.device)[None]
    shared = _weight(model.get_input_embeddings())
    tied = shared is not None and shared is _weight(model.get_output_embeddings())
    scale = _scale(model.get_input_embeddings()) if tied else 1.0
    wrapped = load_adapter(model, folder)
    wanted = logits(wrapped, ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (share := _share_merged(wrapped)) is not None and share < _LOST:
        warn(
            f"model.adapter {folder}: only {share:.0%} of its change is kept when it is merged in 16 bits; the rest "
            "is rounded away; use --set model.dtype=float32"
        )
    apart = _as_one_matrix(embedding, head, shared, scale) if tied and _touches(wrapped, (embedding, head)) else None
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = unmarked(wrapped.merge_and_unload()).requires_grad_(False)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"adapter {folder}: cannot be merged into its model: {first_line(error)}") from error
    if apart is not None:  # otherwise it would be merged into the weight that both share
        made.get_input_embeddings().weight, made.get_output_embeddings().weight = apart
        made.config.tie_word_embeddings = False
    off = float((logits(made, ids) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not off <= max(1e-3, 16 * torch.finfo(made.dtype).eps):
        raise DataError(
            f"adapter {folder}: the merged model has other logits (by {off:.1%}); merge it with peft "
            "(merge_and_unload), check the result, and give it as the model"
        )
    return made


def _share_merged(wrapped: nn.Module) -> float | None:
    """Return the share of the adapter's change that is kept in 16-bit weights; None for wider weights."""
    from peft.tuners.lora import LoraLayer

    arrived = Arrived()
    adapted: list[Any] = [layer for layer in wrapped.modules() if isinstance(layer, LoraLayer)]
    for layer in adapted:
        base = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(base, nn.Parameter) or base.dtype.itemsize > 2:
            continue
        for name in layer.active_adapters:
            exact = base.detach().float() + layer.get_delta_weight(name).detach().float()
            arrived.add(base.detach(), exact, exact.to(base.dtype))
    return arrived.share


def _scale(embedding: nn.Module) -> float:
    """Return the factor by which an embedding multiplies its rows (as in Gemma), measured on one entry."""
    weight = _weight(embedding).float()
    row = int(weight.abs().amax(1).argmax())
    at = int(weight[row].abs().argmax())
    with torch.no_grad():
        return float(embedding(torch.tensor([row], device=weight.device))[0, at].float() / weight[row, at])


def _as_one_matrix(embedding: Any, head: Any, like: Tensor, scale: float) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights with which a plain embedding and a plain head equal these two with their adapters."""
    rows, width = like.shape
    with torch.no_grad():
        vectors = embedding(torch.arange(rows, device=like.device)) / scale
        one = torch.eye(width, device=like.device, dtype=like.dtype)
        answers = (head(one) - head(torch.zeros_like(one[:1]))).mT
    return tuple(nn.Parameter(w.to(like).contiguous(), requires_grad=False) for w in (vectors, answers))  # type: ignore


def _weight(layer: Any) -> Any:
    """Return the weight of an embedding or head, below the wrapper of an adapter."""
    while layer is not None and not isinstance(getattr(layer, "weight", None), nn.Parameter):
        layer = getattr(layer, "original_module", None) or getattr(layer, "base_layer", None)
    return None if layer is None else layer.weight


def _touches(wrapped: nn.Module, layers: Iterable[nn.Module]) -> bool:
    own = {id(p) for layer in layers for p in layer.parameters()}
    return any(id(p) in own for p in saved_parameters(wrapped).values())
