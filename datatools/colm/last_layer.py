"""The last value projection of a decoder, found by trial: the matrix whose per-sample gradients are features.

A matrix inside a late decoder layer affects nothing before that layer. So the exact per-sample gradients need one
forward pass, of which only the part after the projection is differentiated (`exact.py`). A directional derivative needs
only the layers from there on, run again on their stored input (`replay.py`): earlier layers are skipped inside the
model's own forward pass, so that masks, positions, scaling of logits and the head remain the model's own code.

`LastLayer.of` finds the matrix, and checks that the fast paths are correct for the model, by trial on a few random
tokens. Where a fast path is not correct, the definition is used: one backward pass per row, and whole forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datatools.colm.exact import exact_gradients
from datatools.colm.layer_calls import blocks_of, matrices_of
from datatools.colm.probes import slopes
from datatools.colm.replay import evaluating, loss_of, replaying
from datatools.colm.target import Target
from datatools.colm.value_rows import Found, Kind, Place, all_of, look, named_for_values
from datatools.errors import DataError
from datatools.gradients import Batch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LastLayer(Target):
    """The last value projection of a decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> last = LastLayer.of(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)))
        >>> last.name, last.shape
        ('model.layers.1.self_attn.v_proj.weight', (16, 16))

    """

    @classmethod
    def of(cls, model: nn.Module, projection: str | None = None) -> LastLayer:
        """Find the last value projection of `model` by a few small passes on random tokens.

        No weight, mode or global generator changes. If the last layers have no attention of their own (hybrids, shared
        keys and values), the last layer that has is used.

        Args:
            model: a decoder.
            projection: name of a linear layer inside a decoder layer, or the end of its name, to use that layer
                instead.

        Returns:
            The target.

        Raises:
            DataError: if no layer is suitable; the message describes what was looked for.

        """
        kind = type(model).__name__
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise DataError(f"{kind} is an encoder-decoder; coresets need a decoder-only model")
        if hasattr(model, "_orig_mod") or isinstance(model, DistributedDataParallel):
            raise DataError(f"{kind} is a wrapper that does not run the hooks of inner layers; pass the inner model")
        if not _takes_tokens(model):
            return _by_name(cls, model, projection)
        known = matrices_of(model)
        if projection is not None:
            projection = _full_name(model, known, projection)
        with evaluating(model), _untouched(model):
            try:
                found = look(model, lambda rows, tokens: _logits(model, _tokens(model, rows, tokens)), projection)
            except Exception as error:  # models that need other inputs raise all kinds of errors
                raise DataError(
                    f"{kind}: a forward and backward pass on a few random tokens failed ({_line(error)}); coresets "
                    "need a differentiable decoder whose only required input is input_ids"
                ) from error
            if projection is not None and projection not in found.first:
                raise DataError(f"{kind}: no decoder layer uses {projection!r}; name a linear layer inside one")
            if found.place is None:
                raise DataError(_no_values(cls, model, found))
            return _tried(model, _placed(cls, model, found, found.place))


def _takes_tokens(model: nn.Module) -> bool:
    """Return whether `model` is a language model of transformers or peft."""
    embeddings = getattr(model, "get_input_embeddings", None)
    return callable(embeddings) and hasattr(model, "config")


def _full_name(model: nn.Module, known: Mapping[str, nn.Module], projection: str) -> str:
    """Find the last linear layer whose name is `projection` or ends in it, because adapters add prefixes to names."""
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    for name, module in reversed(modules):
        if name == projection or name.endswith(f".{projection}"):
            if name in known:
                return name
            raise DataError(f"{name} is a {type(module).__name__}; expected a linear layer, plain or with LoRA")
    raise DataError(f"{type(model).__name__}: no layer {projection!r}; its linear layers are {_some(known)}")


def _some(names: Mapping[str, object]) -> str:
    """List linear layers with `*` in place of layer numbers."""
    return ", ".join(dict.fromkeys(".".join("*" if x.isdigit() else x for x in name.split(".")) for name in names))


def _by_name(cls: type[LastLayer], model: nn.Module, projection: str | None) -> LastLayer:
    """Find a layer by the usual names of value projections, for modules that are not transformers language models."""
    known, blocks = matrices_of(model), blocks_of(model)
    if not blocks:
        raise DataError(f"{type(model).__name__}: no decoder found; looked for an nn.ModuleList of layers")
    *_, last = blocks
    inside = [name for name in known if name.startswith(f"{last}.")]
    if projection is not None:
        name = _full_name(model, known, projection)
        last = next((block for block in blocks if name.startswith(f"{block}.")), last)
    elif not (found := [name for name in inside if named_for_values(name)]):
        raise DataError(
            f"{type(model).__name__}: no value projection in its last layer ({last}); looked for v_proj, value_proj "
            f"and the like, found the linear layers {[name.removeprefix(last + '.') for name in inside]}; name one of "
            "them (projection=)"
        )
    else:
        name = found[-1]
    order = list(blocks)
    layers = tuple(blocks[block] for block in order[: order.index(last) + 1])
    rows = all_of(model, name).rows
    target = _target(cls, model, name, rows, "values" if projection is None else "named")
    return replace(target, layers=layers)


def _no_values(cls: type[LastLayer], model: nn.Module, found: Found) -> str:
    """Compose the error for a model without a value projection, with a layer that can be named instead."""
    last = found.calls[-1] if found.calls else ""
    inside = [name for name in found.first if name.startswith(f"{last}.")]
    text = (
        f"{type(model).__name__}: no linear layer in its {len(set(found.calls))} decoder layers makes attention values "
        "or mixes tokens"
    )
    for name in reversed(inside):
        try:
            _tried(model, _placed(cls, model, found, all_of(model, name)))
        except DataError:
            continue
        return f"{text}; the last layer has {inside}; name one of them (projection={name!r})"
    return f"{text}, and no gradient reaches those of the last one ({inside}); coresets cannot use this architecture"


def _placed(cls: type[LastLayer], model: nn.Module, found: Found, place: Place) -> LastLayer:
    """Build the target for rows of a linear layer, with the decoder layers that are called up to its first call."""
    target, known = _target(cls, model, place.projection, place.rows, place.kind), matrices_of(model)
    sharing = {id(module) for module in target.sharing}
    start = min(i for name, i in found.first.items() if id(known[name]) in sharing)
    blocks = blocks_of(model) or {"": model}
    before = dict.fromkeys(name for name in found.calls[:start] if name != found.calls[start])
    return replace(target, layers=tuple(blocks[name] for name in (*before, found.calls[start])))


def _target(cls: type[LastLayer], model: nn.Module, where: str, rows: Tensor, kind: Kind) -> LastLayer:
    """Build the target for the outputs `rows` of a projection, without its decoder layers."""
    known = matrices_of(model)
    module = known[where]
    adapter = _adapter(module, where)
    weight, transposed = _weight(module, adapter)
    if weight is None:
        raise DataError(
            f"{where} has quantized weights, which have no gradient; give it an adapter (lora.targets), or name "
            "another linear layer (projection=)"
        )
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    sharing = tuple(m for n, m in known.items() if n == where or (adapter is None and _weight(m, None)[0] is weight))
    first, count = int(rows[0]), len(rows)
    run = torch.equal(rows, torch.arange(first, first + count))
    return cls(
        layers=(),
        projection=module,
        sharing=sharing,
        name=name,
        outputs=slice(first, first + count) if run else rows.to(weight.device),
        shape=(count, weight.shape[0 if transposed else 1]),
        parameter=weight,
        transposed=transposed,
        adapter=adapter,
        kind=kind,
    )


def _weight(module: nn.Module, adapter: str | None) -> tuple[nn.Parameter | None, bool]:
    """Return LoRA's B, or a linear layer's floating-point weight; and whether it is [in, out], as in Conv1D."""
    if adapter is not None:
        b: Any = module.lora_B[adapter]  # type: ignore[index]
        return (b if isinstance(b, nn.Parameter) else b.weight), False  # AdaLoRA keeps B itself
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    usable = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2
    return (weight if usable else None), not hasattr(base, "out_features")


def _adapter(module: nn.Module, where: str) -> str | None:
    """Return the active LoRA adapter of `module`, if any; merged ones count as its weight. Several are refused."""
    if not hasattr(module, "lora_B") or getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    active = list(getattr(module, "active_adapters", []))
    adapters = [name for name in active if name in module.lora_B]  # type: ignore[operator]
    if len(adapters) > 1:
        raise DataError(f"{where}: expected one active LoRA adapter, not {active}; merge or disable the others")
    return str(adapters[0]) if adapters else None


def _tokens(model: nn.Module, rows: int, tokens: int) -> Tensor:
    """Draw random tokens, int64 [rows, tokens], without special tokens."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    special = {v for k, v in config.to_dict().items() if k.endswith("token_id") and isinstance(v, int)}
    size = int(getattr(embeddings, "num_embeddings", None) or config.vocab_size)
    ids = torch.tensor([i for i in range(min(size, 4096)) if i not in special])
    drawn = torch.randint(len(ids), (rows, tokens), generator=torch.Generator().manual_seed(rows))
    return ids[drawn].to(next(model.parameters()).device)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(input_ids=ids, use_cache=False)
    return output.logits if hasattr(output, "logits") else output[0]  # type: ignore[no-any-return]


def _probe(model: nn.Module, batch: Batch) -> Tensor:
    """Compute one number per row that depends on all of its logits: a loss for trials."""
    logits = _logits(model, batch["input_ids"]).flatten(1).float()
    return logits @ torch.arange(logits.shape[1], device=logits.device).mul(0.7).cos()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restore the model's modules and the global generators at the end, whatever the model changes in the block.

    Raises DataError for a model that replaces its own modules when it gets so few tokens.
    """
    plain = (str, int, float, bool, type(None))
    modules = {name: dict(module._modules) for name, module in model.named_modules()}
    owners = [*model.modules(), *{id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values()]
    marks = [(owner, {k: v for k, v in vars(owner).items() if isinstance(v, plain)}) for owner in owners]
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        replaced = [
            n for n, inside in modules.items() if [*model.get_submodule(n)._modules.values()] != [*inside.values()]
        ]
        for name in replaced:
            model.get_submodule(name)._modules = modules[name]
        for owner, before in marks:
            vars(owner).update({key: value for key, value in before.items() if vars(owner).get(key) != value})
        if replaced:
            raise DataError(
                f"{type(model).__name__}: it replaces modules of {replaced[0]} for short inputs, so hooks on its "
                "layers are unreliable; load it with one kind of attention for all lengths (BigBird: "
                "attention_type='original_full' in its configuration)"
            )


def _tried(model: nn.Module, target: LastLayer) -> LastLayer:
    """Set the fast paths of `target` that are correct for this model. DataError if it gets no gradient at all."""
    batch = {"input_ids": _tokens(model, 3, 5)}  # unequal numbers of rows and tokens, to tell the dimensions apart
    dtype: list[torch.dtype] = []  # of the output, which autocast may change
    handle = target.projection.register_forward_hook(lambda _, args, output: dtype.append(output.dtype))
    try:
        want = exact_gradients(model, _probe, batch, replace(target, product=False))
    except RuntimeError as error:
        want, why = None, _line(error)
    else:
        why = "it is zero or not finite"
    finally:
        handle.remove()
    if want is None or not bool(want.isfinite().all()) or not bool(want.any()):
        raise DataError(
            f"{type(model).__name__}: no gradient reaches {target.name} from the logits of a few random tokens "
            f"({why}); name another linear layer (projection=)"
        )
    exact = torch.finfo(dtype[0]).bits > 16
    found = _or_none(lambda: exact_gradients(model, _probe, batch, target))
    target = replace(target, product=_same(found, want, 1e-2 if exact else 0.1))
    noise = torch.randn(target.parameter.shape, generator=torch.Generator().manual_seed(2)).to(target.parameter)
    places = [target.parameter.detach(), target.parameter.detach() + 0.1 * noise]

    def losses(of: LastLayer) -> list[Tensor]:
        with torch.no_grad(), replaying(model, _probe, batch, of):
            loss = loss_of(model, _probe, batch, of)
            return [loss(place) for place in places]

    whole, again = losses(replace(target, replays=False)), _or_none(lambda: losses(target))
    close = again is not None and all(
        _same(found, want, tolerance)
        for found, want, tolerance in (
            (again[0], whole[0], 1e-4 if exact else 1e-2),
            (again[1], whole[1], 1e-4 if exact else 1e-2),
            (again[1] - again[0], whole[1] - whole[0], 1e-2 if exact else 0.2),
        )
    )
    along = (want * target.part(noise)).flatten(1).sum(1)
    slope = _or_none(lambda: slopes(model, _probe, batch, target, target.part(noise)[None])[:, 0])
    return replace(target, replays=close, forwards=_same(slope, along, 1e-2 if exact else 0.1))


def _or_none(function: Callable[[], T]) -> T | None:
    try:
        return function()
    except Exception:  # a fast path that does not suit the model may raise anything; the definition is used instead
        return None


def _same(found: Tensor | None, want: Tensor, tolerance: float) -> bool:
    return (
        found is not None
        and found.shape == want.shape
        and float((found.double() - want.double()).norm()) <= tolerance * float(want.double().norm())
    )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
