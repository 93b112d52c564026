"""Saved adapters of every kind in peft: they are located in a folder, checked, and put on a model."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from datatools import DataError, files
from pipelines.models import patterns, saved_states, weight_files
from pipelines.models.base import READ_AGAIN, Standing, unload
from pipelines.models.lora import seeded
from pipelines.models.quiet import quiet
from pipelines.texts import named

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of an adapter as peft saves it."""

KINDS = frozenset({
    "LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA",
    "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
"""The kinds of peft that are layers on a model and have no state outside their file; each has a test."""
_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_REFUSED = {
    "megatron_config": "imports the Python module that megatron_core names",
    "alora_invocation_tokens": "activates the adapter only inside a row, which losses and gradients do not support",
}
_MOVED = 1e-4  # of a weight's norm; the base weights after two starts of one adapter may differ by this much


def adapter_folder(folder: Path) -> Path | None:
    """Return the folder of the adapter: the folder itself, or its only subfolder with a named adapter; else None.

    Args:
        folder: The folder.

    Raises:
        DataError: There are several named adapters, and it is not clear which one is meant.
    """
    if (folder / CONFIG).is_file():
        return folder
    named = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if len(named) > 1:
        raise DataError(
            f"{folder}: contains {len(named)} adapters ({', '.join(path.name for path in named)}); move the files of "
            f"the trained one ({CONFIG}, {WEIGHTS}) into the folder itself"
        )
    return named[0] if named else None


def load_adapter(model: Any, folder: Path) -> Any:
    """Return a model with the adapter from a folder (adapter_config.json, adapter_model.safetensors), weights frozen.

    Everything that peft saves with an adapter is loaded too: layers that were trained as a whole (`modules_to_save`),
    biases, and the weights below adapters on embeddings and heads. Some initialisations change the base weights when
    the adapter is put on, and the adapter was trained on the changed weights. They are repeated here, twice, to check
    that they are reproducible.

    Args:
        model: The base model.
        folder: The folder of the adapter.

    Raises:
        DataError: The folder contains no safetensors adapter (pickled adapters are refused), the adapter does not fit,
            or the base weights of its training cannot be reproduced.
    """
    given, folder = folder, adapter_folder(folder) or folder
    name = "default" if folder == given else folder.name
    if (folder / CONFIG).is_file() and (shards := saved_states.weights(folder)) is not None:
        with files.scratch_folder() as home:
            files.write_bytes(home / CONFIG, files.read_bytes(folder / CONFIG))
            files.write_bytes(home / WEIGHTS, save(saved_states.read_weights(shards)))
            return load_adapter(model, home)
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise DataError(
                f"adapter {folder}: {needed} is missing; expected a folder written by peft's save_pretrained"
            )
    start = _start(folder)
    patterns.check(model, folder, files.read_json(folder / CONFIG, limit=64 << 20))
    weight_files.keys(folder / WEIGHTS)
    if found := [name for name in weight_files.integers(folder / WEIGHTS) if ".lora_" in name]:
        raise DataError(
            f"adapter {folder}: {weight_files.counted(found, 'is', 'are')} saved as integers "
            f"({weight_files.few(found)}); save the adapter again in float32 or bfloat16"
        )
    standing = Standing.of(model)
    wrapped = _put_on(standing, folder, name, seed=0)
    if isinstance(start, str) and model in READ_AGAIN and (changed := standing.changed()):
        first = {name: standing.tensors[name].detach().clone() for name in changed}
        unload(wrapped)
        wrapped = _put_on(standing, folder, name, seed=1)
        for weight, value in first.items():
            off = float((standing.tensors[weight] - value).float().norm() / value.float().norm().clamp_min(1e-30))
            if off > max(_MOVED, torch.finfo(value.dtype).eps):
                unload(wrapped)
                raise DataError(
                    f"adapter {folder}: its initialisation {start!r} drew the base weights of its training at "
                    f"random (two draws differ by {off:.1%} of {weight!r}), and they were not saved. {_KEEP_BASE}"
                )
    return wrapped.eval()


_KEEP_BASE = (
    "Save that base in the training script (model = peft_model.unload(); model.save_pretrained(BASE)), give BASE as "
    'the model, and write "init_lora_weights": true in adapter_config.json'
)


def _start(folder: Path) -> object:
    """Return the adapter's `init_lora_weights`.

    Raises:
        DataError: Its base weights cannot be reproduced, or its method does not put layers on a model.
    """
    config = files.read_json(folder / CONFIG, limit=64 << 20)
    if not isinstance(config, dict):
        raise DataError(f"adapter {folder}: {CONFIG} is not a file of peft: expected an object")
    start = config.get("init_lora_weights")
    _check_settings(folder, config)
    if isinstance(start, str) and start.lower().startswith(("corda", "lora_ga")):
        raise DataError(
            f"adapter {folder}: its initialisation {start!r} changed the base weights using values computed from "
            f"data, and those were not saved. {_KEEP_BASE}"
        )
    if start == "loftq" and find_spec("bitsandbytes") is None:
        raise DataError(
            f"adapter {folder}: its initialisation 'loftq' quantises the base weights with bitsandbytes, which is not "
            f"installed. Install it, or: {_KEEP_BASE[0].lower()}{_KEEP_BASE[1:]}"
        )
    return start


def _check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse kinds of adapters that are not layers on a model, and settings that would load code or other files.

    Raises:
        DataError: The adapter is refused; the message names its kind or the setting.
    """
    kind = config.get("peft_type")
    if kind in _TOKENS:
        raise DataError(f"adapter {folder}: {kind} adds tokens before a row instead of layers to a model; use LoRA")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(
            f"adapter {folder}: peft_type {kind!r} in {CONFIG} is not supported; use one of {', '.join(sorted(KINDS))}"
        )
    for name, why in _REFUSED.items():
        if config.get(name):
            raise DataError(f"adapter {folder}: {name} in {CONFIG} {why}; remove it, or train the adapter without it")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    for field in dataclasses.fields(found) if found is not None else ():
        value = config.get(field.name, False)
        if field.type in (bool, "bool") and not isinstance(value, bool):
            shown = repr(str(value)[:40])
            raise DataError(f"adapter {folder}: {field.name} in {CONFIG} is {shown}; expected true or false")
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"adapter {folder}: {name} in {CONFIG} is {value}; expected a finite number")


def _put_on(standing: Standing, folder: Path, name: str, *, seed: int) -> Any:
    """Return the model with the adapter, after checking that all saved weights are in it; restored if that fails."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with quiet(), warnings.catch_warnings(), seeded(seed):
            warnings.simplefilter("ignore")  # keys that do not match are an error below
            wrapped = PeftModel.from_pretrained(standing.model, str(folder), adapter_name=name, is_trainable=False)
            expected = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
        beside = dict(wrapped.state_dict())
        with safe_open(folder / WEIGHTS, "pt") as saved:
            keys = set(saved.keys())
            unmatched = set(expected) - keys
            for key in keys - set(expected):  # base weights, saved for embeddings and heads with an adapter
                if key not in beside or not torch.equal(beside[key].cpu(), saved.get_tensor(key).to(beside[key].dtype)):
                    unmatched.add(key)
    except (MemoryError, torch.OutOfMemoryError):
        standing.restore()
        raise
    except Exception as error:  # peft trusts the files, so a damaged or hostile one can cause any error
        standing.restore()
        raise DataError(f"adapter {folder}: does not fit this model: {_why(error)}") from error
    if unmatched:
        standing.restore()
        raise DataError(
            f"adapter {folder}: does not fit this model: {weight_files.counted(unmatched, 'has', 'have')} no "
            f"counterpart ({weight_files.few(sorted(unmatched))})"
        )
    held = {(t.data_ptr(), t.shape) for t in expected.values()}
    wrapped._datatools_standing = standing
    wrapped._datatools_saved = [n for n, p in wrapped.named_parameters() if (p.data_ptr(), p.shape) in held]
    return wrapped


def _why(error: BaseException) -> str:
    resized = re.search(r"size mismatch for (\S*(?:embed|head|wte)\S*): .*?\[(\d+), .*?\[(\d+),", str(error), re.S)
    if resized:
        return (
            f"it was trained with a vocabulary of {resized[2]} tokens and the model has {resized[3]}; resize the model "
            f"first (model.resize_token_embeddings({resized[2]}), model.save_pretrained(BASE)) and give BASE as the "
            "model"
        )
    mismatch = re.search(r"size mismatch for .*", str(error))
    return mismatch[0] if mismatch else named(error)


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters in an adapter's file, of a model from `load_adapter`; empty for other models.

    Args:
        model: The model.
    """
    names = set(getattr(model, "_datatools_saved", ()))
    return {name: p for name, p in model.named_parameters() if name in names}
