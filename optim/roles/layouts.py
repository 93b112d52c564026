"""The memory layout of the matrices of a parameter, if it is not [outputs, inputs]."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from optim.roles.kinds import kind_of
from optim.roles.names import ADAPTER, Name, name_of, words_of

Named: TypeAlias = list[tuple[str, Tensor]]

_CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}
_UP = re.compile(r"gate|up|^(w|fc|v)_?[13]$|^wi(_\d)?$|input|^c_fc$")
_DOWN = re.compile(r"down|^(w2|fc2)$|^wo|output|^c_proj$")
_FUSED = re.compile(r"gate_up|up_gate|gateup|^w13$|input_linear")
_ROUTER = {"router", "gate", "gating", "classifier", "wg"}
_STACK = re.compile(r"(proj|weight|linear)$")
# XLNet has [inputs, heads, size], which is flattened to [inputs, outputs]; RecurrentGemma has [heads, inputs, outputs]
_INPUTS_FIRST = re.compile(r"rel_attn\.[qkvr]$|rg_lru\.(input|recurrent)_gate_weight$|mm_input_projection_weight$")


def layouts(
    matrices: Iterable[tuple[str, Tensor]],
    others: Iterable[tuple[str, Tensor]] = (),
    owners: Mapping[str, nn.Module | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the memory layout of those matrices that are not [outputs, inputs]; see `optim.roles.roles`.

    Args:
        matrices: The (name, parameter) pairs of the matrices.
        others: Other parameters that help to decide: biases, routers, embeddings.
        owners: The module of each parameter, by name, if it is known.

    Returns:
        The fields of `MatrixRule` that describe the layout, by the name of the matrix.
    """
    matrices = list(matrices)
    around = dict(others) | dict(matrices)
    routers = [(name, param) for name, param in around.items() if param.ndim == 2 and _is_router(name_of(name))]
    owners = owners or {}
    found: dict[str, dict[str, Any]] = {}
    stacks: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)  # parent -> own name -> parameter
    flat: list[tuple[str, Tensor]] = []
    for name, param in matrices:
        it = name_of(name)
        path = ".".join(it.parts[: it.at + 1])
        if _INPUTS_FIRST.search(path):
            batched = {"batched": True} if "rg_lru" in path else {}
            found[name] = {"transposed": True} | batched
        elif param.ndim == 3 and (_is_stack(it) or (it.raw and _beside(name, routers)[:1] == param.shape[:1])):
            stacks[path.rpartition(".")[0]][it.own] = name, param
        elif param.ndim == 2:
            flat.append((name, param))
    for of_one in stacks.values():
        for name, turned in _orientations(of_one, around, routers, owners).items():
            found[name] = {"batched": True} | ({"transposed": True} if turned else {})
    found |= _one_below_the_other(flat, routers, owners)
    found |= {name: {"transposed": True} for name in _conv1d(flat, around, owners)}
    return found


def _is_stack(name: Name) -> bool:
    """Return whether a tensor with three dimensions is a stack of matrices, and not a convolution or a projection."""
    if any("expert" in part or "moe" in part for part in name.parts[: name.at + 1]):
        return True
    return bool(_STACK.search(name.own)) and (name.raw or name.own.endswith("linear"))


def _orientations(
    stack: Mapping[str, tuple[str, Tensor]],
    around: Mapping[str, Tensor],
    routers: Named,
    owners: Mapping[str, nn.Module | None],
) -> dict[str, bool]:
    """Return, by the names of the stacks of one mixture, whether their matrices are [inputs, outputs]."""
    stated = {name: getattr(owners.get(name), "is_transposed", None) for name, _ in stack.values()}
    if all(isinstance(value, bool) for value in stated.values()):
        return {name: bool(value) for name, value in stated.items()}
    votes = {vote for own, entry in stack.items() if (vote := _by_bias(*entry, around)) is not None}
    for up, (_, first) in stack.items():
        for down, (_, second) in stack.items():
            if up != down and _UP.search(up) and _DOWN.search(down) and not _DOWN.search(up):
                (c, d), (a, b) = first.shape[1:], second.shape[1:]
                factors = (2,) if _FUSED.search(up) else (1, 2)
                straight = d == a and c in [k * b for k in factors]
                turned = c == b and d in [k * a for k in factors]
                if straight != turned:
                    votes.add(turned)
    if not votes:
        votes = {vote for own, entry in stack.items() if (vote := _by_width(own, *entry, around, routers)) is not None}
    return {name: votes == {True} for name, _ in stack.values()}


def _by_bias(name: str, param: Tensor, around: Mapping[str, Tensor]) -> bool | None:
    prefix = name.rpartition(".")[0]
    bias = around.get(f"{name}_bias", around.get(f"{prefix}.bias" if name.endswith(".weight") else ""))
    rows, columns = param.shape[-2:]
    if bias is None or bias.ndim == 0 or rows == columns:
        return None
    return {rows: False, columns: True}.get(bias.shape[-1])


def _by_width(own: str, name: str, param: Tensor, around: Mapping[str, Tensor], routers: Named) -> bool | None:
    beside = _beside(name, routers)
    width = beside[1] if beside else _width(around)
    rows, columns = param.shape[-2:]
    if width is None or (rows == width) == (columns == width):
        return None
    if _DOWN.search(own):
        return bool(columns == width)
    return bool(rows == width) if _UP.search(own) else None


def _is_router(name: Name) -> bool:
    layers = name.parts[:-1]
    between = [part for part in layers if not part.isdigit()][-2:]  # `router.layer`, `gate.wg`, and plain `gate`
    return not name.is_bias and any(set(words_of(part)) <= _ROUTER for part in between)


def _beside(name: str, routers: Named) -> tuple[int, ...]:
    """Return the shape [experts, width of the model] of the nearest router in the layer of a tensor, or ()."""
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        for router, param in routers:
            if router.startswith(prefix + "."):
                return tuple(param.shape)
        if prefix.rpartition(".")[2].isdigit():
            break  # routers further up belong to other layers
    return ()


def _width(around: Mapping[str, Tensor]) -> int | None:
    widths = Counter(int(p.shape[1]) for n, p in around.items() if p.ndim == 2 and kind_of(n, p) == "embedding")
    return widths.most_common(1)[0][0] if widths else None


def _one_below_the_other(
    flat: Named, routers: Named, owners: Mapping[str, nn.Module | None]
) -> dict[str, dict[str, Any]]:
    """Return the layouts of DBRX's experts, [experts x size, width]; in `w2` rows are inputs."""
    found: dict[str, dict[str, Any]] = {}
    for name, param in flat:
        it = name_of(name)
        if not it.raw or it.leaf not in ("w1", "v1", "w2") or "experts" not in it.parts:
            continue
        count = getattr(owners.get(name), "moe_num_experts", None) or next(iter(_beside(name, routers)), 0)
        if count and count > 1 and param.shape[0] % count == 0:
            found[name] = {"batched": int(count)} | ({"transposed": True} if it.leaf == "w2" else {})
    return found


def _conv1d(flat: Named, around: Mapping[str, Tensor], owners: Mapping[str, nn.Module | None]) -> list[str]:
    """Return the weights that are [inputs, outputs] as in GPT-2's Conv1D; nn.Linear may have the same names."""
    layers = [(name, name_of(name), param) for name, param in flat if name.endswith(".weight")]
    layers = [(name, it, param) for name, it, param in layers if not any(ADAPTER.search(p) for p in it.parts)]
    known = {name: type(owners[name]).__name__ == "Conv1D" for name, _, _ in layers if owners.get(name) is not None}
    votes: dict[str, set[bool]] = defaultdict(set)
    for name, it, param in layers:
        family = "conv1d" if it.own in _CONV1D else it.own
        rows, columns = param.shape
        bias = around.get(name.removesuffix("weight") + "bias")
        if rows == columns:
            continue
        if bias is not None and bias.numel() in (rows, columns):
            votes[family].add(bias.numel() == columns)
        elif it.own in ("c_attn", "c_fc"):
            votes[family].add(rows < columns)
        elif it.own == "c_proj" and it.parent == "mlp":
            votes[family].add(rows > columns)
    turned = {family for family, seen in votes.items() if seen == {True}}
    by_name = {name: ("conv1d" if it.own in _CONV1D else it.own) in turned for name, it, _ in layers}
    return [name for name, told in (by_name | known).items() if told]
