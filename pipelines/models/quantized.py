"""Models whose linear weights are held in 4 or 8 bits by bitsandbytes, as in QLoRA (Dettmers et al. 2023, 2305.14314).

Adapters train on them, and gradient features are those of adapters, so that the weights themselves never change. What
would change them, or would make the result of a row depend on its batch, is refused here by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from datatools import DataError, UsageError, keep_gradients

_READ = "bitsandbytes"
_ADVICE = "give the model with 16-bit weights; --quantize 4bit then holds them in 4 bits"


def options(kind: str, stored: Mapping[str, Any], dtype: torch.dtype, device: str, name: str) -> dict[str, Any]:
    """Return options of `from_pretrained` for weights in few bits; empty for plain weights.

    Args:
        kind: `model.quantize`: 4bit, 8bit or none.
        stored: The `quantization_config` of the model's files; empty without one.
        dtype: The dtype of everything that is not quantized, in which the products are computed.
        device: The device. Weights in few bits are made there, and cannot be moved afterwards.
        name: The name of the model, for messages.

    Raises:
        UsageError: The files are quantized already.
        DataError: The files are quantized in a way in which rows of a batch depend on each other.
    """
    if stored:
        method = stored.get("quant_method", "an unknown method")
        if kind != "none":
            raise UsageError(
                f"--quantize {kind}: the weights of --model {name} are quantized already ({method}); leave it out"
            )
        if stored.get("load_in_8bit") or stored.get("_load_in_8bit"):
            _check_threshold(stored.get("llm_int8_threshold", 6.0), f"--model {name}", "in its config.json")
        return {"device_map": {"": device}} if method == _READ else {}
    if kind == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "4bit":
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    else:
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return {"quantization_config": how, "device_map": {"": device}}


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights bitsandbytes holds in 4 or 8 bits.

    Args:
        model: Any module.
    """
    found = [layer for layer in model.modules() if type(layer).__module__.partition(".")[0] == _READ]
    return [layer for layer in found if any(not p.is_floating_point() for p in layer.parameters(recurse=False))]


def prepare(model: nn.Module, name: str) -> None:
    """Refuse weights in few bits with which gradients cannot be computed, and keep the others in their layout.

    Args:
        model: The model.
        name: The name of the model, for messages.

    Raises:
        DataError: Layers of 8 bits look for outliers over a whole batch, 4-bit weights are in a layout without
            gradients already, or another package holds the weights.
    """
    try:
        keep_gradients(model)
    except ValueError as error:
        raise DataError(f"--model {name}: {error}") from error
    ours = layers(model)
    for layer in ours:
        state = getattr(layer, "state", None)
        _check_threshold(getattr(state, "threshold", 0.0), f"--model {name}", "where it is loaded (BitsAndBytesConfig)")
    own = {id(layer) for layer in ours}
    for path, layer in model.named_modules():
        if id(layer) in own:
            continue
        tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        for key, value in tensors:
            if type(value.data) is not torch.Tensor or (value.is_floating_point() and value.element_size() < 2):
                packed = f"{type(value.data).__name__} in {value.dtype}"
            elif isinstance(value, nn.Parameter) and not value.is_floating_point():
                packed = str(value.dtype)
            elif "qweight" in key or "packed" in key:
                packed = f"{value.dtype}, packed"
            else:
                continue
            method = _method(model)
            raise DataError(
                f"--model {name}: the weight {path}.{key} is quantized{method} ({packed}); of quantized weights only "
                f"those of bitsandbytes are read; {_ADVICE}"
            )


def refuse_training(model: nn.Module) -> None:
    """Refuse to train all weights of a model whose weights are held in few bits.

    Args:
        model: The model.

    Raises:
        UsageError: The model has such weights.
    """
    if found := layers(model):
        raise UsageError(
            f"this trains all weights, and {len(found)} layers of the model hold theirs in 4 or 8 bits, which have no "
            "gradients; train adapters on them (lora.rank 8), or give the model with 16-bit weights"
        )


def refuse_rounding(model: nn.Module) -> None:
    """Refuse a model that rounds its activations: small differences between its losses would be those of rounding.

    Args:
        model: The model.

    Raises:
        UsageError: Layers compute in 8 bits.
    """
    if any(hasattr(layer, "state") for layer in layers(model)):
        raise UsageError(
            "the model's layers round activations to 8 bits, and the differences between orders are smaller than that; "
            "use --quantize 4bit, which rounds only weights, or give the model with 16-bit weights"
        )


def refuse_merging(model: nn.Module, adapter: object) -> None:
    """Refuse to merge an adapter into weights that are held in few bits, which would round it away.

    Args:
        model: The base model.
        adapter: The folder of the adapter, for the message.

    Raises:
        UsageError: The model has such weights.
    """
    if layers(model):
        raise UsageError(
            f"adapter {adapter}: this command puts other adapters on the model, so that this one would have to be "
            "merged into weights of 4 or 8 bits, which would round it away; merge it into the 16-bit model "
            "(merge_and_unload of peft, save_pretrained), and give the result with --quantize 4bit"
        )


def _method(model: nn.Module) -> str:
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    return "" if method is None else f" by {getattr(method, 'value', method)}"


def _check_threshold(threshold: Any, what: str, where: str) -> None:
    if threshold:
        raise DataError(
            f"{what}: its 8-bit layers look for outliers over all rows of a batch (llm_int8_threshold {threshold}), so "
            f"that a row's gradient would depend on the other rows; set llm_int8_threshold to 0.0 {where}, or {_ADVICE}"
        )
