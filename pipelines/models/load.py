"""Causal language models, loaded by hub name, from a folder or from a GGUF file.

Reading a model never runs code: safetensors and GGUF are data, pickled weights are refused, and remote code is off
unless it is requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datatools import DataError, DatatoolsError, EnvironmentProblem, UsageError, files, keep_pages
from pipelines import former
from pipelines.models import borrowed, causal, gguf, quantized, saved_states, weight_files
from pipelines.models.adapters import adapter_folder, load_adapter
from pipelines.models.base import READ_AGAIN
from pipelines.models.limits import ModelLimits, limits_of, trained_length
from pipelines.models.merge import merged
from pipelines.models.named import find
from pipelines.models.quiet import quiet
from pipelines.runs import current, devices, memory, run_files
from pipelines.runs.workers import world_size
from pipelines.settings import redaction
from pipelines.settings.parts import ModelConfig
from pipelines.texts import first_line, named

_HELD_IN = "weights held in"
"""The name among the digests of a model whose weights were quantized when it was loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for use: in eval mode, on its device, with its tokenizer and its origin."""

    model: Any
    tokenizer: Any
    folder: Path | None
    """The local folder of the weights; None for a hub name."""
    digests: Mapping[str, str]
    """File name -> xxh3-128 of weights and configuration, which are part of the fingerprint of a store."""
    limits: ModelLimits = ModelLimits()
    """The length of its rows, and its token ids."""


def resolve(name: str) -> str:
    """Return a folder or hub name that transformers can load; a GGUF file is converted once.

    Args:
        name: The name of the model.

    Raises:
        UsageError: The name is a path that does not exist or contains no model.
        EnvironmentProblem: The demo's model is requested, but its package is not installed.
    """
    found = find(name)
    if isinstance(found, Path):
        return str(found if found.is_dir() else gguf.converted(found))
    return found


def load(
    config: ModelConfig,
    *,
    tokenizer_only: bool = False,
    tokenizer: LoadedModel | None = None,
    weights: Path | None = None,
    merge: bool = True,
) -> LoadedModel:
    """Return model and tokenizer of a configuration, with its adapter if it names one; eval mode, all weights frozen.

    If a tokenizer was saved with the adapter, it is used, together with its chat template.

    Args:
        config: The model, its adapter and its chat format.
        tokenizer_only: Whether to read no weights; the result then has no model.
        tokenizer: The result of `tokenizer_only` for the same model and adapter, so that its tokenizer is not read
            again.
        weights: A folder from which to take the model instead: a checkpoint of a run that trained all weights (Trainer
            saves no tokenizer there), without an adapter.
        merge: Whether to merge the adapter into one plain model, on which other adapters may be put. Otherwise the
            adapter stays separate from its layers, exact in every dtype.

    Raises:
        UsageError: There is no such model.
        DataError: Weights cannot be read, or are pickled.
        EnvironmentProblem: The model cannot be reached.
    """
    if (lent := borrowed.find(config.name)) is not None:
        held = lent.model if weights is None else _weights_of(config, weights)
        if held is not None:
            _check_held(config, held)
        return LoadedModel(held, lent.tokenizer, None, lent.digests, lent.limits)
    from transformers import AutoTokenizer

    name = resolve(config.name)
    with _read_errors(config):
        source, options = name, _hub_options(config)
        if (folder := _folder(name)) is not None:
            run_files.check_saved(folder)
            weight_files.check_settings(folder, trusted=config.trust_remote_code)
        digests = _digests(name, config.revision, code=[".py"] if config.trust_remote_code else [])
        if config.quantize != "none":
            digests |= {_HELD_IN: config.quantize}
        if config.adapter is not None and config.adapter.is_dir():
            beside = adapter_folder(config.adapter) or config.adapter
            run_files.check_saved(beside)
            digests |= {f"adapter/{file}": digest for file, digest in _digests(str(beside)).items()}
            if (beside / "tokenizer_config.json").is_file():
                weight_files.check_settings(beside, trusted=config.trust_remote_code)
                source, options = str(beside), {"trust_remote_code": config.trust_remote_code}
    encode = None if tokenizer is None else tokenizer.tokenizer
    if encode is None:
        what = f"the tokenizer of --model {config.name}" if source == name else f"tokenizer {source}"
        with _read_errors(config, what):
            encode = AutoTokenizer.from_pretrained(source, **options)
    with _read_errors(config):
        if tokenizer_only:
            return LoadedModel(None, encode, _folder(name), digests, _limits(name, _hub_options(config)))
    apart = None if merge or weights is not None else config.adapter
    model: Any = _weights_of(config if apart is None else config.model_copy(update={"adapter": None}), weights)
    limits = limits_of(model)
    if apart is not None:
        model = load_adapter(model, apart)
    causal.check(model, config.name)
    if (run := current.run()) is not None:
        used = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        run.provenance.setdefault("models", {})[redaction.hide(config.name)] = used
    return LoadedModel(model, encode, _folder(name), digests, limits)


def _weights_of(config: ModelConfig, weights: Path | None) -> Any:
    """Return the model of `config`, frozen and in eval mode; with `weights`, that of this folder without an adapter."""
    if weights is not None and (shards := saved_states.weights(weights)) is not None:
        model: Any = _with_weights(_weights_of(config.model_copy(update={"adapter": None}), None), shards)
        READ_AGAIN[model] = partial(_weights_of, config, weights)
        return model
    name, options = resolve(config.name), _hub_options(config)
    if weights is not None and config.quantize != "none":
        raise UsageError(
            f"--quantize {config.quantize}: {weights} is a checkpoint of a run that trained all weights, and weights "
            "in few bits have no gradients; give checkpoints of adapters, or leave the flag out"
        )
    if weights is not None:
        name, options = str(weights), {"trust_remote_code": config.trust_remote_code}
    devices.use(config, processes=world_size() > 1)
    device, dtype = devices.kind(), devices.dtype_of(config)
    if device == "cpu":
        keep_pages()
    with _read_errors(config, None if weights is None else f"checkpoint {weights}"):
        stored = _stored(name, options)
    options |= quantized.options(config.quantize, stored, dtype, device, config.name)
    read = partial(weight_files.read, name, dtype=dtype, use_safetensors=True, **options)
    large = (
        f"{config.name} in {dtype} does not fit on {device}; use --dtype bfloat16, another --device or a smaller model"
    )
    with _read_errors(config, None if weights is None else f"checkpoint {weights}"), memory.explained(large):
        try:
            model = read(attn_implementation=config.attention)
        except ValueError as error:  # raised before any weight is read
            if config.attention == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
            model = read(attn_implementation="eager")
        if "device_map" not in options:
            model = model.to(device)
    model.requires_grad_(False)
    if (shown := redaction.hide(name)) != name:  # peft writes it into an adapter's files
        model.name_or_path = model.config._name_or_path = shown
    READ_AGAIN[model] = partial(_weights_of, config.model_copy(update={"adapter": None}), weights)
    if config.adapter is not None and weights is None:
        # merged, so that new adapters and those of checkpoints are put on one plain model
        model = merged(model, config.adapter)
        READ_AGAIN[model] = partial(_weights_of, config, None)
    return model.eval()


def _check_held(config: ModelConfig, model: Any) -> None:
    """Refuse settings that a model in memory does not have; it is neither moved nor converted."""
    if config.dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise UsageError(
            f"this works in {config.dtype}, and the model in memory is in {model.dtype}; give a copy in "
            f"{config.dtype}: copy.deepcopy(model).to(torch.{config.dtype})"
        )
    if config.quantize != "none":
        raise UsageError(
            f"model.quantize is {config.quantize}, and the model is in memory already; load it with "
            "quantization_config=BitsAndBytesConfig(...), or leave the setting out"
        )
    if config.device != "auto" and model.device.type != config.device.partition(":")[0]:
        raise UsageError(
            f"model.device is {config.device}, and the model in memory is on {model.device}; move it, or leave the "
            "setting out"
        )


def _with_weights(model: nn.Module, shards: Path) -> nn.Module:
    """Return a model with the weights that trainers save in shards; weights that were not trained stay unchanged."""
    held, every = saved_states.read_weights(shards), dict(model.named_parameters(remove_duplicate=False))
    if any("lora_" in name for name in held):
        raise DataError(
            f"{shards}: contains adapters without their adapter_config.json; copy it from the run's last adapter into "
            f"{shards.parent} (or train with fsdp_state_dict_type FULL_STATE_DICT, which saves both)"
        )
    shares = {id(every[name]) for name in held if name in every}
    unknown = sorted(name for name in held if name not in every or held[name].shape != every[name].shape)
    left = sorted(name for name, p in every.items() if id(p) not in shares) if shards.name != "zero" else []
    if unknown or left:
        raise DataError(f"{shards}: weights of another model: {(unknown or left)[0]!r} has no counterpart")
    with torch.no_grad():
        for name, value in held.items():
            every[name].copy_(value)
    return model


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return options


@contextmanager
def _read_errors(config: ModelConfig, what: str | None = None) -> Iterator[None]:
    """Convert errors of transformers while it reads a model, and silence its advice to developers.

    transformers trusts the files, so a damaged or hostile one can cause any error.

    Args:
        config: The configuration of the model.
        what: What is read, if it is not the model itself.
    """
    what = what or f"--model {config.name}"
    try:
        with quiet():
            yield
    except (DatatoolsError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise EnvironmentProblem(f"{what}: needs a package that is not installed: {first_line(error)}") from error
    except OSError as error:
        raise EnvironmentProblem(f"{what}: {first_line(error)}") from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{what}: comes with its own Python code, which is not run unless this command allows it; read the "
                "code, and if you trust it, add --trust-remote-code"
            ) from error
        raise DataError(f"{what}: cannot be loaded: {named(error)}") from error


def _limits(name: str, options: Mapping[str, Any]) -> ModelLimits:
    """Return the limits of a model without reading its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, **options)
    code = {key: value for key, value in options.items() if key == "trust_remote_code"}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return limits_of(AutoModelForCausalLM.from_config(config, attn_implementation="eager", **code))
    except Exception:  # it cannot be built without weights; loading it reports any fault
        return ModelLimits(trained_length(config))


def _stored(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `quantization_config` of a model's files; empty if its weights are plain."""
    from transformers import PreTrainedConfig

    found = PreTrainedConfig.get_config_dict(name, **options)[0].get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None


def digests_like(model: Any, theirs: Mapping[str, str]) -> Mapping[str, str]:
    """Return what identifies a model in memory, in the terms in which something that was made of a model names it.

    Args:
        model: A model of transformers, or of peft, whose base model counts.
        theirs: What identifies the other model: the digests of its files, or of weights in memory.
    """
    if borrowed.IN_MEMORY in theirs:
        return {borrowed.IN_MEMORY: borrowed.digest(model)}
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    try:
        return _digests(name) if name else {}
    except OSError:
        return {}


def _digests(name: str, revision: str | None = None, *, code: Sequence[str] = ()) -> dict[str, str]:
    """Return what identifies a model: a hash of each weight and configuration file; the commit for a hub name.

    Args:
        name: The folder or hub name.
        revision: The revision of a hub name.
        code: Suffixes of files that are run.
    """
    folder = _folder(name)
    if folder is None:
        from transformers.utils.hub import cached_file

        commit = Path(cached_file(name, "config.json", revision=revision)).parent.name
        return {"hub": redaction.hide(name), "commit": commit}
    suffixes = (".safetensors", ".json", ".jinja", *code)
    kept = [p for p in sorted(folder.iterdir()) if p.suffix in suffixes and p.is_file()]
    return {p.name: files.seal_once(p).digest for p in kept if p.name != gguf.SEAL}


former.callable_as(__name__, "load")
