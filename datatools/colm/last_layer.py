"""The last value projection of a decoder, found by trying: the matrix whose per-example gradients are features.

A matrix inside a late decoder layer changes nothing before that layer. So the exact gradient of each example needs one
forward pass, of which only what follows the projection is differentiated (`exact.py`); and a directional derivative
needs the layers from there on, run again on their stored input (`replay.py`): those before are skipped inside the
model's own forward pass, so that masks, positions, scaling of logits and the head are the model's own code.

Which matrix it is, and that the fast ways are right for the model at hand, is found by trying on a few random tokens
(`LastLayer.of`). Where a fast way is not right, the definition is used: a backward pass per row, whole forward passes.
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
from datatools.colm.probes import slopes
from datatools.colm.replay import evaluating, loss_of, replaying
from datatools.colm.target import Target
from datatools.colm.value_rows import Found, Kind, Place, all_of, blocks_of, look, matrices_of, named_for_values
from datatools.errors import DataError
from datatools.gradients import Batch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LastLayer(Target):
    """The last value projection of a decoder."""

    @classmethod
    def of(cls, model: nn.Module, projection: str | None = None) -> LastLayer:
        """Find it in `model`, by a few small passes on random tokens; no weight, mode or global generator changes.

        The last layer that has attention of its own counts, where the last ones have none (hybrids, shared keys and
        values). projection: the name of a linear layer inside a decoder layer, or its end, to have that one instead.
        Raises: DataError where nothing fits, saying what was looked for.
        """
        kind = type(model).__name__
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise DataError(f"{kind} is an encoder-decoder; coresets need a decoder-only model")
        if hasattr(model, "_orig_mod") or isinstance(model, DistributedDataParallel):
            raise DataError(f"{kind} is a wrapper whose layers hooks do not see; pass the model that is inside it")
        if not _takes_tokens(model):
            return _by_name(cls, model, projection)
        known = matrices_of(model)
        if projection is not None:
            projection = _full_name(model, known, projection)
        with evaluating(model), _untouched(model):
            try:
                found = look(model, lambda rows, tokens: _logits(model, _tokens(model, rows, tokens)), projection)
            except Exception as error:  # whatever a model raises that wants other inputs
                raise DataError(
                    f"{kind}: a few random tokens could not be passed through it and back ({_line(error)}); coresets "
                    "need a decoder that takes input_ids alone and can be differentiated here"
                ) from error
            if projection is not None and projection not in found.first:
                raise DataError(f"{kind}: no decoder layer uses {projection!r}; name a linear layer inside one")
            if found.place is None:
                raise DataError(_no_values(cls, model, found))
            return _tried(model, _placed(cls, model, found, found.place))


def _takes_tokens(model: nn.Module) -> bool:
    """Whether `model` is a language model, as transformers or peft make them."""
    embeddings = getattr(model, "get_input_embeddings", None)
    return callable(embeddings) and hasattr(model, "config")


def _full_name(model: nn.Module, known: Mapping[str, nn.Module], projection: str) -> str:
    """The last linear layer whose name is `projection` or ends in it: adapters put names before a model's own."""
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    for name, module in reversed(modules):
        if name == projection or name.endswith(f".{projection}"):
            if name in known:
                return name
            raise DataError(f"{name} is a {type(module).__name__}; expected a linear layer, plain or with LoRA")
    raise DataError(f"{type(model).__name__}: no layer {projection!r}; its linear layers are {_some(known)}")


def _some(names: Mapping[str, object]) -> str:
    """The linear layers of a model, without the numbers of layers."""
    return ", ".join(dict.fromkeys(".".join("*" if x.isdigit() else x for x in name.split(".")) for name in names))


def _by_name(cls: type[LastLayer], model: nn.Module, projection: str | None) -> LastLayer:
    """For modules that are not language models of transformers: a layer with the name of a value projection."""
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
    """What to say of a model without a value projection, with one that can be named instead."""
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
    """The target for rows of a linear layer, with the decoder layers that are called up to its first call."""
    target, known = _target(cls, model, place.projection, place.rows, place.kind), matrices_of(model)
    sharing = {id(module) for module in target.sharing}
    start = min(i for name, i in found.first.items() if id(known[name]) in sharing)
    blocks = blocks_of(model) or {"": model}
    before = dict.fromkeys(name for name in found.calls[:start] if name != found.calls[start])
    return replace(target, layers=tuple(blocks[name] for name in (*before, found.calls[start])))


def _target(cls: type[LastLayer], model: nn.Module, where: str, rows: Tensor, kind: Kind) -> LastLayer:
    """The parameter of a projection, and which part of it stands for the outputs `rows`; without the layers."""
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
    """LoRA's B, or the weight of a linear layer if it is one of numbers; and whether it is [in, out], as Conv1D's."""
    if adapter is not None:
        b: Any = module.lora_B[adapter]  # type: ignore[index]
        return (b if isinstance(b, nn.Parameter) else b.weight), False  # AdaLoRA keeps B itself
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    usable = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2
    return (weight if usable else None), not hasattr(base, "out_features")


def _adapter(module: nn.Module, where: str) -> str | None:
    """The LoRA adapter in force on `module`, if any; merged ones are its weight. Raises: DataError for several."""
    if not hasattr(module, "lora_B") or getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    active = list(getattr(module, "active_adapters", []))
    adapters = [name for name in active if name in module.lora_B]  # type: ignore[operator]
    if len(adapters) > 1:
        raise DataError(f"{where}: expected one LoRA adapter in force, not {active}; merge or disable the others")
    return str(adapters[0]) if adapters else None


def _tokens(model: nn.Module, rows: int, tokens: int) -> Tensor:
    """Random tokens that are no special ones: [rows, tokens]."""
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
    """One number a row that depends on all of its logits: a loss to try things on."""
    logits = _logits(model, batch["input_ids"]).flatten(1).float()
    return logits @ torch.arange(logits.shape[1], device=logits.device).mul(0.7).cos()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Whatever a model draws or changes inside, its modules and the global generators are as they were behind it.

    Raises: DataError for a model that puts other modules in place of its own when it sees so few tokens.
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
                f"{type(model).__name__}: it replaces modules of {replaced[0]} when it sees few tokens, so that its "
                "layers cannot be relied on; load it with one kind of attention for all lengths (BigBird: "
                "attention_type='original_full' in its configuration)"
            )


def _tried(model: nn.Module, target: LastLayer) -> LastLayer:
    """`target` with the fast ways that are right for this model. Raises: DataError where none gives a gradient."""
    batch = {"input_ids": _tokens(model, 3, 5)}  # as many tokens as rows would hide which is which
    dtype: list[torch.dtype] = []  # also of what runs under autocast
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
    except Exception:  # what a fast way meets in a model that it does not fit; the definition is used instead
        return None


def _same(found: Tensor | None, want: Tensor, tolerance: float) -> bool:
    return (
        found is not None
        and found.shape == want.shape
        and float((found.double() - want.double()).norm()) <= tolerance * float(want.double().norm())
    )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]
