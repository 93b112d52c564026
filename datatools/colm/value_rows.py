"""Which outputs of which linear layer of a decoder are attention values, found by derivatives on a tiny random input.

Names and configurations do not tell: joint projections contain queries, keys and values one after another, interleaved
by heads or by groups, with one key for all queries, or with keys and values computed from a shared latent. In every
model, an output y of a linear layer can be recognized by its effect on the decoder layer that contains it:

    y at token t changes the layer's output at a later token         keys and values (not queries and gates)
    y changes the layer's output while attention weights are fixed   values (not queries and keys)

Attention weights are fixed in two ways: by detaching every softmax, and by a row of one token, whose attention weight
is 1 whatever the kernel. So values are the outputs that still have an effect then, and have an effect across tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datatools.colm.layer_calls import BlockCall, FixedWeights, Unclipped, recorded, width_of

NAMES = ("v", "value", "wv")
"""First words of the usual names of value projections: used where softmax does not decide (linear attention)."""
TOKENS = 8
"""Tokens of the row that shows which outputs act across tokens."""
ROWS = 8
"""Rows of one token each; several, because one random direction may be orthogonal to the effect of an output."""
SILENT = 1e-5
"""Relative size below which a derivative counts as zero; it should be exactly zero, but fused kernels round."""

Kind = Literal["values", "output", "named"]


@dataclass(frozen=True)
class Place:
    """Some outputs of a linear layer.

    Attributes:
        projection: name of the layer.
        kind: "values", "output" (of a mixer without values), or "named".
        rows: the outputs, int64 [k].
        width: number of all outputs of the layer.

    """

    projection: str
    kind: Kind
    rows: Int64[Tensor, " k"]
    width: int


def _tokens(output: Tensor) -> int | None:
    """Return the number of positions in a layer's output for one row: `TOKENS`, or more if the model adds some."""
    sizes = output.shape[:-1]
    return None if not sizes else TOKENS if TOKENS in sizes else max(sizes)


def _by_token(x: Tensor, tokens: int) -> Tensor | None:
    """Reshape the output for one row, in any layout, to [tokens, ..., features]; None if no dimension has that size."""
    axes = [i for i, size in enumerate(x.shape[:-1]) if size == tokens]
    if not axes:
        return None
    return x.movedim(1 if 1 in axes else axes[-1], 0).reshape(tokens, -1, x.shape[-1])


@dataclass
class _Acts:
    """Effects of the outputs of one linear layer inside one decoder layer: magnitudes of derivatives [out]."""

    name: str
    alone: Tensor  # with one token, so that attention weights are fixed
    across: Tensor  # from earlier tokens to the last
    at_all: Tensor  # from any token to the last
    floor: float = 0.0

    @property
    def acting(self) -> Tensor:
        """Outputs that act while attention weights are fixed."""
        return self.alone > self.floor

    @property
    def values(self) -> Tensor:
        """Outputs that do so across tokens."""
        return self.acting & (self.across > 0)

    @property
    def weighing(self) -> Tensor:
        """Outputs that act only through attention weights."""
        return (self.at_all > 0) & ~self.acting


def _slopes(block: BlockCall, target: Tensor) -> list[Tensor]:
    """Differentiate `target` by the output of each linear layer in a block call; zeros where there is no path."""
    if not block.matrices:
        return []
    outputs = [y for _, y in block.matrices]
    found = torch.autograd.grad(target, outputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(y) if g is None else g.detach() for y, g in zip(outputs, found, strict=True)]


def _acts(one: BlockCall, many: BlockCall, generator: torch.Generator) -> list[_Acts]:
    """Compute the effects of each linear layer called in a block, in the order of last calls, from both inputs."""
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
    """Return whether the name of a linear layer says that it computes values: v_proj, value, v_lin.

    Args:
        name: name in the model.

    Returns:
        Whether it does.

    """
    return name.rpartition(".")[2].lower().split("_")[0] in NAMES


def _apart(a: str, b: str) -> tuple[int, int]:
    """Return the distance of `a` and `b` in the module tree, and the depth of the innermost module with both."""
    x, y = a.split(".")[:-1], b.split(".")[:-1]
    depth = next((i for i, (one, other) in enumerate(zip(x, y, strict=False)) if one != other), min(len(x), len(y)))
    return len(x) + len(y) - 2 * depth, depth


def _values(block: str, softmax: bool, acts: list[_Acts]) -> Place | None:
    """Find the value projection of one decoder layer: that of softmax attention, else one with a usual name.

    A layer may contain other mixers, and an attention module may contain smaller ones: the values of a softmax are
    computed closest to its queries and keys in the module tree, in the outermost module where that holds.
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
    """Return all outputs of a projection that was requested by name; of a joint projection, those that are values."""
    chosen = next((a for a in acts if a.name == projection), None)
    if chosen is None:
        return None
    values = chosen.values
    joint = bool(chosen.weighing.any()) and bool(values.any())
    rows = values.nonzero()[:, 0].cpu() if joint else torch.arange(len(values))
    return Place(projection, "values" if joint else "named", rows, len(values))


def all_of(model: nn.Module, projection: str) -> Place:
    """Select all outputs of a linear layer.

    Args:
        model: the model.
        projection: name of the layer.

    Returns:
        The outputs, of kind "named".

    """
    width = width_of(model.get_submodule(projection))
    assert width is not None
    return Place(projection, "named", torch.arange(width), width)


def _mixer_output(acts: list[_Acts]) -> Place | None:
    """Return the last linear layer of the module that mixes tokens last."""
    mixing = [a for a in acts if bool((a.across > 0).any())]
    if not mixing:
        return None
    parent = mixing[-1].name.rpartition(".")[0]
    chosen = [a for a in acts if a.name.rpartition(".")[0] == parent and bool((a.at_all > 0).any())][-1]
    return Place(chosen.name, "output", torch.arange(len(chosen.alone)), len(chosen.alone))


@dataclass(frozen=True)
class Found:
    """Result of one examination of a model.

    Attributes:
        calls: names of the decoder layers in the order of their calls, repeated if they are called again.
        first: linear layer -> index in `calls` of its first call.
        place: the value projection, or its substitute; None if no layer mixes tokens.

    """

    calls: tuple[str, ...]
    first: Mapping[str, int]
    place: Place | None


def look(model: nn.Module, forward: Callable[[int, int], Any], projection: str | None = None) -> Found:
    """Find the last value projection of `model`, or the value outputs of `projection`, by two passes.

    Call it in eval mode, with no parameter requiring a gradient.

    Args:
        model: the decoder.
        forward: (rows, tokens) runs the model on random tokens.
        projection: name of a linear layer to examine instead.

    Returns:
        The calls that were seen, and the projection.

    """
    generator = torch.Generator().manual_seed(0)
    own_kernel = getattr(getattr(model, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        with recorded(model) as calls, FixedWeights(calls):
            forward(ROWS, 1)
        ones = {call.name: call for call in calls}
        with recorded(model) as calls, Unclipped():
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
        if place is None and projection in first:  # routed tokens, for which derivatives do not decide
            place = all_of(model, str(projection))
    return Found(tuple(call.name for call in calls), first, place or stand_in)
