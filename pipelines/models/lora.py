"""New LoRA adapters: the layers that get one, and their initial values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datatools import DataError, files
from pipelines.models.base import Standing
from pipelines.models.quiet import quiet
from pipelines.settings.parts import LoraConfig
from pipelines.texts import first_line

_ATTENTION = re.compile(r"attn|attention")


def add_lora(model: Any, config: LoraConfig, *, seed: int) -> Any:
    """Return a model wrapped by peft with new LoRA matrices on `config.targets`; only these train.

    A is drawn from a separate generator, seeded by (seed, parameter name). The global generator is not changed, and
    the matrices do not depend on earlier computations.

    Args:
        model: The base model.
        config: Rank, alpha, dropout and targets.
        seed: The seed of the matrices A; B is zero.

    Raises:
        DataError: No module of the model has a target's name.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    standing = Standing.of(model)
    options = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(model, config),
        task_type="CAUSAL_LM",
    )
    try:
        with quiet(), warnings.catch_warnings(), seeded(seed):
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft detects each layer's layout
            wrapped = get_peft_model(model, options)
    except ValueError as error:
        standing.restore()
        raise DataError(f"lora.targets {config.targets}: {first_line(error)} {_named(model)}") from error
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(int(files.digest(f"{seed}/{name}".encode())[:15], 16))
            bound = parameter.shape[1] ** -0.5  # kaiming_uniform(a=sqrt(5)), peft's own default
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(values)
    wrapped._datatools_standing = standing
    return wrapped


def _targets(model: Any, config: LoraConfig) -> list[str]:
    """Return the layers that get an adapter, as peft takes them.

    Raises:
        DataError: No layer's name ends with one of the targets.
    """
    if isinstance(config.targets, list):
        names = list(dict(model.named_modules()))
        for target in config.targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise DataError(f"lora.targets {target}: no layer of this model has this name. {_named(model)}")
        return list(config.targets)
    linear, head = _linear(model), model.get_output_embeddings()
    called = _called(model, linear)
    every = [n for n, layer in linear.items() if layer is not head and n in called and not _refused(model, n)]
    inside = [name for name in every if _ATTENTION.search(name.rpartition(".")[0].lower())]
    chosen = inside if inside and config.targets == "attention" else every  # a state-space model has no attention
    if not chosen:
        raise DataError(f"lora.targets {config.targets}: this model has no linear layer except its head")
    return _shortest(chosen, [name for name, _ in model.named_modules()])


def _called(model: Any, linear: Mapping[str, nn.Module]) -> set[str]:
    """Return the layers that a row of two tokens passes through, and all experts, which it may not reach.

    Some models read a layer's weight without calling the layer (Mamba's dt_proj); an adapter on it would have no
    effect. Other layers only look linear (routers, grouped products); adapters do not fit their outputs.
    """
    seen = {name for name in linear if "expert" in name.lower()}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.nf
        if isinstance(output, Tensor) and output.shape == (*inputs[0].shape[:-1], outputs):
            seen.add(name)

    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in linear.items()]
    training = model.training
    try:
        logits(model, torch.zeros((1, 2), dtype=torch.int64, device=model.device))
    except Exception:  # a model that needs more inputs than a row; all its layers may be called
        return set(linear)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def _refused(model: Any, name: str) -> bool:
    """Return whether peft refuses an adapter there, because the fused kernels of Mamba read the weights themselves."""
    kind = getattr(model.config, "model_type", None)
    fused = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
    return kind in fused and name.rpartition(".")[2] in ("out_proj", "conv1d")


def _shortest(wanted: list[str], modules: Iterable[str]) -> list[str]:
    """Return the last parts of the names, if no other module has one of them; otherwise the whole names."""
    last = sorted({name.rpartition(".")[2] for name in wanted})
    meant = {name for name in modules if name.rpartition(".")[2] in last}
    return last if meant == set(wanted) else wanted


def _linear(model: Any) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def _named(model: Any) -> str:
    names = sorted({name.rpartition(".")[2] for name in _linear(model)})
    return f"This model's linear layers are named {names}; lora.targets auto uses all of them except the head"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside the `with` block, from which peft draws, and restore them afterwards.

    Args:
        seed: The seed.
    """
    with torch.random.fork_rng():
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(seed % 2**63)
        yield


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA matrices of a peft model by name, in the model's order.

    Args:
        model: The model.
    """
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the float32 logits [b, s, vocabulary] of token ids, without gradients.

    Args:
        model: The model.
        ids: int64 [b, s].
    """
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found.float()
