"""Models that a caller has in memory: available to a run under a name, and returned unchanged.

Inside `lent(model, tokenizer, name)`, `models.load` returns that model for the settings `model.name = name`, so that
every command uses it with the same code. Afterwards the following are restored: modules and their attributes,
parameters and whether they train, gradients, configuration, and the random generators and settings of the process that
training changes. No weight is copied: only adapters train, and they are removed.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from datatools import DataError, UsageError, files
from pipelines.models import base, causal
from pipelines.models.adapters import CONFIG
from pipelines.models.limits import ModelLimits, limits_of
from pipelines.models.merge import merged

_LENT: ContextVar[Mapping[str, Lent]] = ContextVar("lent", default={})  # noqa: B039 (never written to)


IN_MEMORY = "weights in memory"
"""The name of the digest that identifies a model in memory."""


class Lent:
    """A model in memory with its tokenizer, as `models.load` returns it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limits = ModelLimits() if model is None else limits_of(model)
        self.digests: dict[str, str] = {} if model is None else {IN_MEMORY: digest(model)}


def find(name: str) -> Lent | None:
    """Return the model that is available under a name in this context; None if there is none.

    Args:
        name: The name.
    """
    return _LENT.get().get(name)


def digest(model: nn.Module) -> str:
    """Return the xxh3-128 of the names, dtypes and values of all weights, and of the class of the model.

    Adapters of peft do not count: the digest is that of the model below them.

    Args:
        model: The model.
    """
    if hasattr(model, "peft_config"):
        model = model.get_base_model()  # type: ignore[operator]
    parts = [type(model).__name__]
    for name, t in model.state_dict().items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            parts.append(f"{plain} {t.dtype} {tuple(t.shape)} {base.tensor_digest(t)}")
    return files.digest("\n".join(parts).encode())


@contextmanager
def lent(model: Any, tokenizer: Any, name: str, *, trains: bool = True) -> Iterator[Any]:
    """Make `models.load` return a model and a copy of its tokenizer for a name inside the `with` block.

    Args:
        model: A causal language model of transformers, or a model of peft with one active adapter. A model of peft is
            copied, and its adapter is merged into the copy, so that other adapters may be put on it. None for commands
            that use no model.
        tokenizer: Its tokenizer, which is copied.
        name: The name in settings.
        trains: Whether the model will be trained; it must then be on the device on which the Trainer trains.

    Yields:
        The model that is used, in eval mode, with all weights frozen.

    Raises:
        UsageError: The model cannot be used, or not on its device.
        DataError: The adapter cannot be merged.
    """
    _check(model, tokenizer, trains=trains)
    with ExitStack() as stack:
        stack.enter_context(_process())
        if model is not None:
            stack.enter_context(unchanged(model))
            model = _ready(model, name)
        token = _LENT.set({**_LENT.get(), name: Lent(model, copy.deepcopy(tokenizer))})
        try:
            yield model
        finally:
            _LENT.reset(token)


def _ready(model: Any, name: str) -> Any:
    """Return the plain model to use, in eval mode with frozen weights."""
    if hasattr(model, "peft_config"):
        model = _merged_copy(model)
    model.eval().requires_grad_(False)
    for module in model.modules():  # it recomputes activations during training, which adapters do not support
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    causal.check(model, name)
    return model


def _check(model: Any, tokenizer: Any, *, trains: bool) -> None:
    """Refuse objects that are no model or tokenizer, and models on an unusable device."""
    if model is not None and (not isinstance(model, nn.Module) or not hasattr(model, "config")):
        raise UsageError(
            f"model is {_kind(model)}; expected a causal language model of transformers, or one of peft "
            "(AutoModelForCausalLM.from_pretrained(...)); for a name or a folder use the command line"
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "encode"):
        raise UsageError(f"tokenizer is {_kind(tokenizer)}; expected the model's (AutoTokenizer.from_pretrained(...))")
    devices = [] if model is None else sorted({str(p.device) for p in model.parameters()})
    if "meta" in devices:
        raise UsageError(
            "some weights of the model are not loaded (they are on the meta device, as offloading leaves them); load "
            "it whole onto one device"
        )
    if len(devices) > 1:
        raise UsageError(f"the model is spread over {', '.join(devices)}; load it onto one device")
    if trains and devices and devices[0].startswith("cuda") and devices[0] != "cuda:0":
        raise UsageError(
            f"the model is on {devices[0]}, and a warm-up trains on the first GPU; move it there (model.to('cuda:0')), "
            f"or start Python with CUDA_VISIBLE_DEVICES={devices[0].removeprefix('cuda:')}"
        )


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}" if value is not None else "None"


def _merged_copy(model: Any) -> Any:
    """Return a plain copy of a model of peft, with the weights of its active adapter merged in."""
    active = list(getattr(model, "active_adapters", ()))
    if not hasattr(model, "get_base_model"):
        raise UsageError(
            "adapters were added to this model by transformers (add_adapter); save it and load it again with "
            "peft.PeftModel.from_pretrained(base, folder), or give the plain model"
        )
    if len(active) != 1:
        raise UsageError(
            f"the model has {len(active)} active adapters ({', '.join(map(str, active))}); choose one: "
            "model.set_adapter(NAME)"
        )
    with files.scratch_folder() as scratch:
        model.save_pretrained(str(scratch), selected_adapters=active, safe_serialization=True)
        folder = scratch if (scratch / CONFIG).is_file() else scratch / active[0]
        try:
            plain = base.unmarked(copy.deepcopy(model).unload())
        except (RuntimeError, AttributeError, TypeError) as error:
            raise DataError(f"the model cannot be copied without its adapter: {error}") from error
        return merged(plain.eval().requires_grad_(False), folder)


# ------------------------------------------------------------------------------------------------- given back as it was


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore a model at the end of the `with` block: modules, attributes, parameters, gradients and configuration.

    Args:
        model: The model.
    """
    modules = [(module, _attributes(module)) for module in model.modules()]
    params = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    settings = [(held, copy.deepcopy(vars(held))) for held in _configurations(model)]
    try:
        yield
    finally:
        for module, before in modules:
            _restore(module, before)
        for p, data, trains, grad in params:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            p.requires_grad_(trains)
            p.grad = grad
        for held, kept in settings:
            now = vars(held)
            for name in now.keys() - kept.keys():
                del now[name]
            for name, value in kept.items():
                if name not in now or now[name] != value:
                    now[name] = value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, with copies of its tables (children, parameters, buffers, hooks)."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


def _restore(module: nn.Module, before: Mapping[str, Any]) -> None:
    now = vars(module)
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        held = now.get(name)
        if not isinstance(value, dict) or not isinstance(held, dict):
            now[name] = value
        elif [(key, id(one)) for key, one in held.items()] != [(key, id(one)) for key, one in value.items()]:
            held.clear()
            held.update(value)


def _configurations(model: Any) -> list[Any]:
    held = [getattr(model, name, None) for name in ("config", "generation_config")]
    return [one for one in held if one is not None and hasattr(one, "__dict__")]


@contextmanager
def _process() -> Iterator[None]:
    """Restore generators, environment, threads and the state of accelerate at the end of the `with` block."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared: list[dict[str, Any]] = [one._shared_state for one in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in shared]
    environment, threads = dict(os.environ), torch.get_num_threads()
    drawn, drawn_numpy, drawn_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_numpy)
        torch.set_rng_state(drawn_torch)
        if drawn_cuda is not None:
            torch.cuda.set_rng_state_all(drawn_cuda)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        for state, before in zip(shared, kept, strict=True):
            state.clear()
            state.update(before)
