"""Adapters on a model: put on, read from a folder, taken off again, merged.

Taking an adapter off must leave the base model as it was, and peft does not promise that: some initialisations (PiSSA,
OLoRA, LoftQ) move the base weights when the adapter is put on, trained biases are the base's own, and a layer that was
trained whole stays in the place of the original. So what stood there is noted before, and checked after: modules and
parameters by identity, weights by their digest. What changed is put back, the weights from the model's files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from datatools import DataError, files
from optim import Arrived
from pipelines.models import loading, saved_states
from pipelines.runs.folder import warn
from pipelines.settings.config import LoraConfig
from pipelines.texts import first_line, named

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

READ_AGAIN: weakref.WeakKeyDictionary[nn.Module, Callable[[], nn.Module]] = weakref.WeakKeyDictionary()
"""How the weights of a model are read once more; `models.load` notes it for every model that it makes."""

KINDS = frozenset({
    "LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA",
    "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
"""The kinds of peft that are layers on a model and hold nothing but what their file holds; each has a test."""

_TOKENS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_REFUSED = {
    "megatron_config": "imports the Python module that megatron_core names",
    "alora_invocation_tokens": "turns the adapter on inside of a row only, which losses and gradients do not follow",
}

_MOVED = 1e-4  # of a weight's norm: two starts of one adapter may leave base weights that differ by so much
_LOST = 0.9  # of an adapter's change: less than this arriving in merged weights is said
_ATTENTION = re.compile(r"attn|attention")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice to its own developers and its progress bars: loading, wrapping, saving."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # of peft, where a run does not write down the base's path; its vocabulary is checked when it is loaded
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------------- the model below


@dataclass(frozen=True)
class _Standing:
    """A plain model's modules, parameters and weights as they were before an adapter was put on."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Standing:
        tensors = dict(_tensors(model))
        return cls(model, dict(model.named_modules()), tensors, {name: _digest(t) for name, t in tensors.items()})

    def changed(self) -> list[str]:
        """The names of weights that are not what they were."""
        return [name for name, tensor in self.tensors.items() if _digest(tensor) != self.digests[name]]

    def restore(self) -> None:
        """Put modules, parameters and weights back.

        Raises: DataError when weights changed and cannot be read again as they were.
        """
        for name, module in self.modules.items():
            if name:
                _parent(self.modules, name)._modules[name.rpartition(".")[2]] = module
        for name, tensor in self.tensors.items():
            holder, own = _parent(self.modules, name), name.rpartition(".")[2]
            if own in holder._parameters:
                holder._parameters[own] = tensor  # type: ignore[assignment]
        _unmarked(self.model).requires_grad_(False)
        if changed := self.changed():
            read = READ_AGAIN.get(self.model)
            if read is not None:
                again = dict(_tensors(read()))
                with torch.no_grad():
                    for name in changed:
                        tensor = self.tensors[name]
                        if name in again and again[name].shape == tensor.shape:
                            tensor.data = again[name].to(tensor).clone()
                changed = self.changed()
            if changed:
                raise DataError(
                    f"an adapter changed {len(changed)} weights of its base model, the first {changed[0]!r}, and they "
                    "cannot be read again as they were; load the model again before using it"
                )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that are part of a saved model: rotary tables may follow the length of a row."""
    kept = model.state_dict(keep_vars=True)
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _parent(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    return modules[name.rpartition(".")[0]]


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return files.digest(values.numpy().data)


def unload(wrapped: Any) -> None:
    """Take the adapters off a peft model: its base model is as it was, to the bit, and may take others.

    Raises: DataError when the base weights changed and cannot be read again.
    """
    standing: _Standing = wrapped._datatools_standing
    wrapped.unload()
    standing.restore()


def _unmarked(model: Any) -> Any:
    """`model` without the marks that peft leaves on it when it puts the layers back."""
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(model):
            delattr(model, mark)
    return model


# ---------------------------------------------------------------------------------------------------- fresh adapters


def add_lora(model: Any, config: LoraConfig, *, seed: int) -> Any:
    """`model` wrapped by peft with fresh LoRA matrices on `config.targets`; only they train.

    A is drawn from a generator of its own, seeded by (seed, parameter name): the global generator is not touched and
    the matrices do not depend on what ran before.
    Raises: DataError when no module of the model has a target's name.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    standing = _Standing.of(model)
    options = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(model, config),
        task_type="CAUSAL_LM",
    )
    try:
        with quiet(), warnings.catch_warnings(), _drawn(seed):
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds each layer's layout by itself
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
    """The layers that get an adapter, as peft takes them. Raises: DataError for a name that no layer ends with."""
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
        raise DataError(f"lora.targets {config.targets}: this model has no linear layer but its head")
    return _shortest(chosen, [name for name, _ in model.named_modules()])


def _called(model: Any, linear: Mapping[str, nn.Module]) -> set[str]:
    """Those of the layers that a row of two tokens passes through, and experts, which it may not reach.

    Some models read a layer's weight and never call it (Mamba's dt_proj): an adapter on it would do nothing. And some
    layers only look like linear ones (routers that choose, products in groups): adapters do not fit their outputs.
    """
    seen = {name for name in linear if "expert" in name.lower()}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.nf
        if isinstance(output, Tensor) and output.shape == (*inputs[0].shape[:-1], outputs):
            seen.add(name)

    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in linear.items()]
    training = model.training
    try:
        _logits(model, torch.zeros((1, 2), dtype=torch.int64, device=model.device))
    except Exception:  # a model that wants more inputs than a row: all its layers may be called
        return set(linear)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def _refused(model: Any, name: str) -> bool:
    """Whether peft refuses an adapter there: layers whose weights the fused kernels of Mamba read themselves."""
    kind = getattr(model.config, "model_type", None)
    fused = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
    return kind in fused and name.rpartition(".")[2] in ("out_proj", "conv1d")


def _shortest(wanted: list[str], modules: Iterable[str]) -> list[str]:
    """The last parts of the names `wanted`, where no other module has one of them; the whole names otherwise."""
    last = sorted({name.rpartition(".")[2] for name in wanted})
    meant = {name for name in modules if name.rpartition(".")[2] in last}
    return last if meant == set(wanted) else wanted


def _linear(model: Any) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def _named(model: Any) -> str:
    names = sorted({name.rpartition(".")[2] for name in _linear(model)})
    return f"This model's linear layers are named {names}; lora.targets auto takes all but the head"


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """What peft draws, from the global generators and no other, is of `seed`, and does not show outside."""
    with torch.random.fork_rng():
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(seed % 2**63)
        yield


# ---------------------------------------------------------------------------------------------------- saved adapters


def adapter_folder(folder: Path) -> Path | None:
    """Where in `folder` the adapter is: itself, or its one subfolder of an adapter with a name; None without one.

    Raises: DataError for several adapters with names, of which nothing tells the one that is meant.
    """
    if (folder / CONFIG).is_file():
        return folder
    named = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if len(named) > 1:
        raise DataError(
            f"{folder}: holds {len(named)} adapters ({', '.join(path.name for path in named)}); move the files of the "
            f"one that was trained ({CONFIG}, {WEIGHTS}) into the folder itself"
        )
    return named[0] if named else None


def load_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` (adapter_config.json, adapter_model.safetensors), weights frozen.

    What peft saves beside an adapter is read too: layers that were trained whole (`modules_to_save`), biases, the
    weights below adapters on embeddings and heads. Some initialisations change the base weights when the adapter is put
    on, and the adapter was trained on top of that; they are done again here, twice, to see that they repeat.
    Raises: DataError when the folder holds no safetensors adapter (pickled adapters are refused), when it does not fit,
    or when the base that it was trained on cannot be had again.
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
                f"adapter {folder}: {needed} is missing; expected a folder that peft's save_pretrained wrote"
            )
    start = _start(folder)
    loading.keys(folder / WEIGHTS)
    standing = _Standing.of(model)
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
                    f"adapter {folder}: its initialisation {start!r} drew the base weights that it was trained on at "
                    f"random (two draws differ by {off:.1%} of {weight!r}), and they were not saved. {_KEEP_BASE}"
                )
    return wrapped.eval()


_KEEP_BASE = (
    "Save that base in the training script (model = peft_model.unload(); model.save_pretrained(BASE)), give BASE as "
    'the model, and write "init_lora_weights": true in adapter_config.json'
)


def _start(folder: Path) -> object:
    """The adapter's `init_lora_weights`.

    Raises: DataError for one whose base weights cannot be had again, and for a method that puts no layers on a model.
    """
    config = files.read_json(folder / CONFIG, limit=64 << 20)
    if not isinstance(config, dict):
        raise DataError(f"adapter {folder}: {CONFIG} is not what peft writes: expected an object")
    start = config.get("init_lora_weights")
    _check_settings(folder, config)
    if isinstance(start, str) and start.lower().startswith(("corda", "lora_ga")):
        raise DataError(
            f"adapter {folder}: its initialisation {start!r} changed the base weights by what it had computed from "
            f"data, and that was not saved. {_KEEP_BASE}"
        )
    if start == "loftq" and importlib.util.find_spec("bitsandbytes") is None:
        raise DataError(
            f"adapter {folder}: its initialisation 'loftq' quantises the base weights by bitsandbytes, which is not "
            f"installed. Install it, or: {_KEEP_BASE[0].lower()}{_KEEP_BASE[1:]}"
        )
    return start


def _check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse kinds of adapters that are not layers on a model, and settings that would load code or other files.

    Raises: DataError naming the kind or the setting.
    """
    kind = config.get("peft_type")
    if kind in _TOKENS:
        raise DataError(f"adapter {folder}: {kind} puts tokens before a row, not layers on a model; use LoRA")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(
            f"adapter {folder}: peft_type {kind!r} in {CONFIG} is not read here; use one of {', '.join(sorted(KINDS))}"
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


def _put_on(standing: _Standing, folder: Path, name: str, *, seed: int) -> Any:
    """The model with the adapter on it, checked to hold all that was saved; put back as it was when that fails."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with quiet(), warnings.catch_warnings(), _drawn(seed):
            warnings.simplefilter("ignore")  # keys that do not match are an error below
            wrapped = PeftModel.from_pretrained(standing.model, str(folder), adapter_name=name, is_trainable=False)
            expected = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
        beside = dict(wrapped.state_dict())
        with safe_open(folder / WEIGHTS, "pt") as saved:
            keys = set(saved.keys())
            unmatched = set(expected) - keys
            for key in keys - set(expected):  # weights of the base, saved for embeddings and heads with an adapter
                if key not in beside or not torch.equal(beside[key].cpu(), saved.get_tensor(key).to(beside[key].dtype)):
                    unmatched.add(key)
    except (MemoryError, torch.OutOfMemoryError):
        standing.restore()
        raise
    except Exception as error:  # peft trusts what the files say, so a damaged or hostile one can make it raise anything
        standing.restore()
        raise DataError(f"adapter {folder}: does not fit this model: {_why(error)}") from error
    if unmatched:
        standing.restore()
        raise DataError(
            f"adapter {folder}: does not fit this model: {loading.counted(unmatched, 'has', 'have')} no counterpart "
            f"({loading.few(sorted(unmatched))})"
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


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA matrices of a peft model by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an adapter's file holds, of a model on which `load_adapter` put it; none of other models."""
    names = set(getattr(model, "_datatools_saved", ()))
    return {name: p for name, p in model.named_parameters() if name in names}


# ------------------------------------------------------------------------------------------------------------ merged


def merged(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` merged into its weights, one plain model.

    Where embedding and head share a weight and the adapter is on one of them, each gets a weight of its own. The merged
    model's logits are compared with those of the adapted one.
    Raises: DataError as `load_adapter`, and when the adapter cannot be merged. Warns when weights of 16 bits round much
    of it away.
    """
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=model.device)[None]
    shared = _weight(model.get_input_embeddings())
    tied = shared is not None and shared is _weight(model.get_output_embeddings())
    scale = _scale(model.get_input_embeddings()) if tied else 1.0
    wrapped = load_adapter(model, folder)
    wanted = _logits(wrapped, ids)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (share := _share_merged(wrapped)) is not None and share < _LOST:
        warn(
            f"model.adapter {folder}: of its change {share:.0%} arrive in weights that are merged in 16 bits, the rest "
            "is rounded away; use --set model.dtype=float32"
        )
    apart = _as_one_matrix(embedding, head, shared, scale) if tied and _touches(wrapped, (embedding, head)) else None
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = _unmarked(wrapped.merge_and_unload()).requires_grad_(False)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"adapter {folder}: cannot be merged into its model: {first_line(error)}") from error
    if apart is not None:  # merged into the weight that both share, it would be on both
        made.get_input_embeddings().weight, made.get_output_embeddings().weight = apart
        made.config.tie_word_embeddings = False
    off = float((_logits(made, ids) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not off <= max(1e-3, 16 * torch.finfo(made.dtype).eps):
        raise DataError(
            f"adapter {folder}: merged into its model it gives other logits (by {off:.1%}); merge it with peft "
            "(merge_and_unload), look at the result, and give that as the model"
        )
    return made


def _share_merged(wrapped: nn.Module) -> float | None:
    """How much of the adapter's change stays when it is added to weights of 16 bits; None for wider ones."""
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
    """What an embedding multiplies its rows by (Gemma's does), as it does it."""
    weight = _weight(embedding).float()
    row = int(weight.abs().amax(1).argmax())
    at = int(weight[row].abs().argmax())
    with torch.no_grad():
        return float(embedding(torch.tensor([row], device=weight.device))[0, at].float() / weight[row, at])


def _as_one_matrix(embedding: Any, head: Any, like: Tensor, scale: float) -> tuple[nn.Parameter, nn.Parameter]:
    """The weights with which a plain embedding and a plain head do what these with their adapters do."""
    rows, width = like.shape
    with torch.no_grad():
        vectors = embedding(torch.arange(rows, device=like.device)) / scale
        one = torch.eye(width, device=like.device, dtype=like.dtype)
        answers = (head(one) - head(torch.zeros_like(one[:1]))).mT
    return tuple(nn.Parameter(w.to(like).contiguous(), requires_grad=False) for w in (vectors, answers))  # type: ignore


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found.float()


def _weight(layer: Any) -> Any:
    """The weight of an embedding or head, below what an adapter puts around it."""
    while layer is not None and not isinstance(getattr(layer, "weight", None), nn.Parameter):
        layer = getattr(layer, "original_module", None) or getattr(layer, "base_layer", None)
    return None if layer is None else layer.weight


def _touches(wrapped: nn.Module, layers: Iterable[nn.Module]) -> bool:
    own = {id(p) for layer in layers for p in layer.parameters()}
    return any(id(p) in own for p in saved_parameters(wrapped).values())
