"""Which outputs of which linear layer of a decoder are attention values, found by derivatives at a tiny random input.

Names and configurations do not say it: joint projections hold queries, keys and values one after another, interleaved
head by head or group by group, with one key for all queries, or keys and values behind a shared latent. What tells them
apart on any model is what they do to the layer that holds them, for one output y of one linear layer:

    token t of y changes the layer at a later token                  keys and values (queries and gates do not)
    y changes the layer while the attention weights are held fixed   values (queries and keys do not)

Weights are held fixed twice over: by detaching every softmax, and by a row of one token, whose weight is 1 whatever the
kernel. So values are the rows that still act there, and act across tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from datatools.gradients.layers import is_conv1d

NAMES = ("v", "value", "wv")
"""First words of names of layers that make values: read where no softmax tells (linear attention), or several do."""
TOKENS = 8
"""Tokens of the row that shows what acts across tokens."""
ROWS = 8
"""Rows of one token each; so many, that no output is missed because one random direction does not see it."""
SILENT = 1e-5
"""Relative size under which a derivative counts as zero; exact zeros are expected, fused kernels leave rounding."""

Kind = Literal["values", "output", "named"]


@dataclass
class BlockCall:
    """One call of a decoder layer: the linear layers called inside it, in order, with their outputs; and its own."""

    name: str
    module: nn.Module
    matrices: list[tuple[str, Tensor]] = field(default_factory=list)
    output: Tensor | None = None
    softmax: bool = False


@dataclass(frozen=True)
class Place:
    """Rows of a linear layer's output: `rows` [k] of `width`; kind: values, output (of a mixer without), or named."""

    projection: str
    kind: Kind
    rows: Tensor
    width: int


class _Unclipped(TorchFunctionMode):
    """Clipping (`clip_qkv`) has a derivative everywhere inside: what these tokens exceed, others may not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("clamp", "clip") and isinstance(found, Tensor) and found.requires_grad:
            return args[0] + (found - args[0]).detach()
        return found


class _FixedWeights(_Unclipped):
    """Attention weights have no derivative inside: softmax is detached, fused attention gets detached q and k.

    calls: the last of them is marked as having a softmax.
    """

    def __init__(self, calls: list[BlockCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("softmax", "scaled_dot_product_attention") and self.calls:
            self.calls[-1].softmax = True
        if name == "scaled_dot_product_attention":
            names = ("query", "key")
            args = (*(a.detach() for a in args[:2]), *args[2:])
            kwargs = {k: v.detach() if k in names else v for k, v in kwargs.items()}
        found = super().__torch_function__(func, types, args, kwargs)
        return found.detach() if name == "softmax" and isinstance(found, Tensor) else found


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of every outermost list of modules in `model`."""
    outer: str | None = None  # modules come before what they hold, and all of that before the next
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (outer is not None and name.startswith(f"{outer}.")):
            outer = name
            found |= {f"{name}.{i}": layer for i, layer in enumerate(module)}
    return found


def matrices_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of everything that maps features to features: linear layers of any make, adapters around them."""
    found: dict[str, nn.Module] = {}
    adapter: str | None = None
    for name, module in model.named_modules():
        if adapter is not None and name.startswith(f"{adapter}."):
            continue
        if getattr(module, "base_layer", None) is not None:
            adapter = name
        if width_of(module) is not None:
            found[name] = module
    return found


def width_of(module: nn.Module) -> int | None:
    """Outputs of a linear layer, plain, quantized or under an adapter; of GPT-2's Conv1D; None for other modules."""
    base: Any = getattr(module, "base_layer", module)
    if is_conv1d(base):
        return int(base.nf)
    out = getattr(base, "out_features", None)
    return out if isinstance(out, int) and hasattr(base, "in_features") else None


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[BlockCall]]:
    """The calls of decoder layers inside, in order. Outputs of linear layers are in the graph, and safe from writes."""
    calls: list[BlockCall] = []
    open_: list[BlockCall] = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls.append(BlockCall(name, module))
            open_.append(calls[-1])

        return hook

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        open_.pop().output = first_tensor(output)

    def report(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            if not open_ or not isinstance(output, Tensor):
                return None
            y = output if output.requires_grad else output.detach().requires_grad_(True)
            open_[-1].matrices.append((name, y))
            return y.clone()  # the model may write into what it gets

        return hook

    handles = []
    try:
        for name, module in matrices_of(model).items():
            handles.append(module.register_forward_hook(report(name)))
        for name, block in (blocks_of(model) or {"": model}).items():
            handles.append(block.register_forward_pre_hook(enter(name)))
            handles.append(block.register_forward_hook(leave))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:
    """The hidden states among what a layer gives back."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((t for t in map(first_tensor, values) if t is not None), None)


def _tokens(output: Tensor) -> int | None:
    """How many places a layer's output has for one row: `TOKENS`, or more where the model adds some of its own."""
    sizes = output.shape[:-1]
    return None if not sizes else TOKENS if TOKENS in sizes else max(sizes)


def _by_token(x: Tensor, tokens: int) -> Tensor | None:
    """x of one row of tokens, in any layout -> [tokens, ..., features]; None where no dimension is theirs."""
    axes = [i for i, size in enumerate(x.shape[:-1]) if size == tokens]
    if not axes:
        return None
    return x.movedim(1 if 1 in axes else axes[-1], 0).reshape(tokens, -1, x.shape[-1])


@dataclass
class _Acts:
    """What the rows of one linear layer do inside one decoder layer: sizes of derivatives [out]."""

    name: str
    alone: Tensor  # at one token, attention weights fixed
    across: Tensor  # from earlier tokens to the last
    at_all: Tensor  # from any token to the last
    floor: float = 0.0

    @property
    def acting(self) -> Tensor:
        """Rows that act while attention weights are fixed."""
        return self.alone > self.floor

    @property
    def values(self) -> Tensor:
        """Rows that do so across tokens."""
        return self.acting & (self.across > 0)

    @property
    def weighing(self) -> Tensor:
        """Rows that act, but only by attention weights."""
        return (self.at_all > 0) & ~self.acting


def _slopes(block: BlockCall, target: Tensor) -> list[Tensor]:
    """Derivatives of `target` for the output of each linear layer in a block call; zeros where there is no path."""
    if not block.matrices:
        return []
    outputs = [y for _, y in block.matrices]
    found = torch.autograd.grad(target, outputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(y) if g is None else g.detach() for y, g in zip(outputs, found, strict=True)]


def _acts(one: BlockCall, many: BlockCall, generator: torch.Generator) -> list[_Acts]:
    """What each linear layer called in a block does, in order of last calls; `one`, `many`: of either input."""
    if one.output is None or many.output is None or not one.output.requires_grad or not many.output.requires_grad:
        return []
    alone: dict[str, Tensor] = {}
    weights = torch.randn(one.output.shape, generator=generator).to(one.output)
    for (name, _), g in zip(one.matrices, _slopes(one, (one.output * weights).sum()), strict=True):
        size = g.double().square().flatten(0, -2).sum(0).sqrt()
        alone[name] = alone.get(name, 0) + size
    count = _tokens(many.output)
    by_token = None if count is None else _by_token(many.output, count)
    if count is None or by_token is None:
        return []
    end = by_token[-1]
    weights = torch.randn(end.shape, generator=generator).to(end)
    found: dict[str, _Acts] = {}
    for (name, _), g in zip(many.matrices, _slopes(many, (end * weights).sum()), strict=True):
        tokens = _by_token(g, count)
        if tokens is None or name not in alone:
            continue
        sizes = tokens.double().abs().amax(1)
        acts = _Acts(name, alone[name], sizes[:-1].amax(0), sizes.amax(0))
        before = found.pop(name, None)
        if before is not None:
            acts = _Acts(name, acts.alone, acts.across.maximum(before.across), acts.at_all.maximum(before.at_all))
        found[name] = acts  # in order of the last call
    mixing = [float(acts.alone[acts.across > 0].max()) for acts in found.values() if bool((acts.across > 0).any())]
    floor = SILENT * max(mixing, default=0.0)
    for acts in found.values():
        acts.floor = floor
    return list(found.values())


def named_for_values(name: str) -> bool:
    """Whether a linear layer's own name says that it makes values: v_proj, value, v_lin."""
    return name.rpartition(".")[2].lower().split("_")[0] in NAMES


def _apart(a: str, b: str) -> tuple[int, int]:
    """Steps between the modules that hold `a` and `b`, over the innermost one that holds both; and its depth."""
    x, y = a.split(".")[:-1], b.split(".")[:-1]
    depth = next((i for i, (one, other) in enumerate(zip(x, y, strict=False)) if one != other), min(len(x), len(y)))
    return len(x) + len(y) - 2 * depth, depth


def _values(block: str, softmax: bool, acts: list[_Acts]) -> Place | None:
    """The value projection of one decoder layer: of softmax attention, else by name where tokens mix otherwise.

    A layer may hold other mixers, and an attention module smaller ones of its own: the values of a softmax are made
    closest to its queries and keys, in the outermost module where that is so.
    """
    makes = [a for a in acts if bool(a.values.any())]
    weighing = [a for a in acts if bool(a.weighing.any())] if softmax else []
    pairs = {a.name: min(_apart(a.name, b.name) for b in weighing) for a in makes if weighing}
    own = block.count(".") + 1 if block else 0
    inside = {name: pair for name, pair in pairs.items() if pair[1] > own}
    if inside:
        makes = [a for a in makes if inside.get(a.name) == min(inside.values())]
    elif not any(bool((a.weighing & (a.across > 0)).any()) for a in weighing):  # no keys: a router's softmax
        weighing = []
    named = [a for a in makes if named_for_values(a.name)]
    if not named and not (weighing and makes):
        return None
    chosen = (named or makes)[-1]
    return Place(chosen.name, "values", chosen.values.nonzero()[:, 0].cpu(), len(chosen.alone))


def _named(acts: list[_Acts], projection: str) -> Place | None:
    """All rows of a projection that was named; of a joint one those that are values."""
    chosen = next((a for a in acts if a.name == projection), None)
    if chosen is None:
        return None
    values = chosen.values
    joint = bool(chosen.weighing.any()) and bool(values.any())
    rows = values.nonzero()[:, 0].cpu() if joint else torch.arange(len(values))
    return Place(projection, "values" if joint else "named", rows, len(values))


def all_of(model: nn.Module, projection: str) -> Place:
    """All outputs of a linear layer."""
    width = width_of(model.get_submodule(projection))
    assert width is not None
    return Place(projection, "named", torch.arange(width), width)


def _mixer_output(acts: list[_Acts]) -> Place | None:
    """The last linear layer of the module in which tokens are mixed last."""
    mixing = [a for a in acts if bool((a.across > 0).any())]
    if not mixing:
        return None
    parent = mixing[-1].name.rpartition(".")[0]
    chosen = [a for a in acts if a.name.rpartition(".")[0] == parent and bool((a.at_all > 0).any())][-1]
    return Place(chosen.name, "output", torch.arange(len(chosen.alone)), len(chosen.alone))


@dataclass(frozen=True)
class Found:
    """What one look at a model saw.

    calls: decoder layers in the order of their calls, repeated where they are called again. first: linear layer -> the
    place in `calls` of its first call. place: the value projection, or what stands in for it; None where nothing mixes
    tokens.
    """

    calls: tuple[str, ...]
    first: Mapping[str, int]
    place: Place | None


def look(model: nn.Module, forward: Callable[[int, int], Any], projection: str | None = None) -> Found:
    """Find the last value projection of `model`, or the value rows of `projection`, by two passes.

    Inside eval mode, with no parameter asking for a gradient. forward: (rows, tokens) runs the model on random tokens.
    """
    generator = torch.Generator().manual_seed(0)
    own_kernel = getattr(getattr(model, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        with recorded(model) as calls, _FixedWeights(calls):
            forward(ROWS, 1)
        ones = {call.name: call for call in calls}
        with recorded(model) as calls, _Unclipped():
            forward(1, TOKENS)
        many = {call.name: call for call in calls}
        first: dict[str, int] = {}
        for i, call in enumerate(calls):
            for name, _ in call.matrices:
                first.setdefault(name, i)
        place, stand_in = None, None
        for name in dict.fromkeys(call.name for call in reversed(calls)):  # by last call, the last one first
            if projection is not None and projection not in [matrix for matrix, _ in many[name].matrices]:
                continue
            acts = _acts(ones[name], many[name], generator) if name in ones else []
            if projection is not None:
                place = _named(acts, projection)
            else:
                place = _values(name, own_kernel or (name in ones and ones[name].softmax), acts)
                stand_in = stand_in or _mixer_output(acts)
            if place is not None:
                break
        if place is None and projection in first:  # routed tokens, of which the derivatives do not tell
            place = all_of(model, str(projection))
    return Found(tuple(call.name for call in calls), first, place or stand_in)
