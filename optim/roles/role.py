"""What each parameter of a model is, and the memory layout of its matrices."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from optim.roles.fused import fused, key_of, looks_fused
from optim.roles.kinds import Kind, is_table, kind_of
from optim.roles.layouts import Named, layouts


@dataclass(frozen=True)
class Role:
    """What a parameter is, and, for a matrix, its memory layout.

    Args:
        kind: The kind of parameter.
        layout: The fields of `MatrixRule` that describe the layout; empty for [outputs, inputs].
        parts: The fields `split_sizes` and `split_groups` for a fused matrix; empty for others, and if the name of a
            matrix is that of a fused one but nothing shows its parts.
    """

    kind: Kind
    layout: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)


def roles(named_parameters: Iterable[tuple[str, Tensor]], model: nn.Module | None = None) -> dict[str, Role]:
    """Return what each parameter is.

    A matrix is the weight of a linear map between features: of a linear layer, a router, a convolution over channels,
    LoRA's A and B (also on a head), and each expert of a mixture, also if one tensor contains all of them. The
    following are not matrices: embeddings and position tables, what follows the last layer (heads, poolers,
    classifiers), norms, biases (also those of experts, [experts, outputs]), depthwise convolutions, time mixes,
    `A_log`, sinks, and all vectors. Without the model, names and shapes decide; if a name is not informative, the shape
    decides.

    The layout is that of `MatrixRule`. "transposed" means that inputs are the first dimension: this holds for GPT-2's
    Conv1D, which is recognised by its biases or by its wider matrices, and for experts as in GPT-OSS and Llama 4.
    "batched" means that one tensor is a stack of matrices. Which dimension of an expert is its outputs is inferred from
    the pair of its matrices, whose outputs and inputs must match, from its biases, or from the width of the model. If
    none of these decides, outputs are taken as the first dimension.

    The parts are those of a fused matrix (query, key and value; gate and up), by its name and the matrix that reads its
    output. Parts that alternate, as in GPT-NeoX and GPT-OSS, are only known with the model.

    Args:
        named_parameters: (name, parameter) pairs.
        model: The model, whose modules are more informative than names.

    Returns:
        The role of each parameter, by name.
    """
    named = list(named_parameters)
    modules = dict(model.named_modules()) if model is not None else {}
    heads = {id(head) for head in (_output_embeddings(model),) if head is not None}
    owners = {name: _owner(name, modules) for name, _ in named}
    kinds: dict[str, Kind] = {}
    for name, param in named:
        owner = owners[name]
        of_head = id(owner) in heads and param.ndim > 1 and not is_table(owner)
        kinds[name] = "head" if of_head else kind_of(name, param, owner)
    found = layouts([entry for entry in named if kinds[entry[0]] == "matrix"], named, owners)
    parts = _parts(named, found, [name for name, _ in named if kinds[name] == "matrix"], modules)
    return {name: Role(kinds[name], found.get(name, {}), parts.get(name, {})) for name, _ in named}


def _parts(
    named: Named, layout_of: Mapping[str, Mapping[str, Any]], matrices: Iterable[str], modules: Mapping[str, nn.Module]
) -> dict[str, Mapping[str, Any]]:
    """Return the parts of fused matrices as fields of `MatrixRule`, by name."""
    chosen = [name for name in matrices if looks_fused(name)]
    params = dict(named)
    shapes: dict[str, tuple[int, int]] = {}  # outputs and inputs
    for name, param in named if chosen else ():
        if param.ndim > 1:
            layout = layout_of.get(name, {})
            count = layout.get("batched", False)
            first = 1 if count is True else 0
            rows, columns = param.shape[first], math.prod(param.shape[first + 1 :])
            rows //= 1 if isinstance(count, bool) else count
            shapes[name] = (columns, rows) if layout.get("transposed") else (rows, columns)
    inputs = {key_of(name): shape[1] for name, shape in shapes.items()}
    found: dict[str, Mapping[str, Any]] = {}
    for name in chosen:
        path = name.rpartition(".")[0]
        owner = modules.get(path)
        holder = owner if owner is None or f"{path}.weight" != name else modules.get(path.rpartition(".")[0])
        parts = fused(name, shapes[name], inputs, holder, biased=f"{name}_bias" in params)
        if parts is not None:
            sizes, groups = parts
            found[name] = {"split_sizes": sizes} | ({"split_groups": groups} if groups > 1 else {})
    return found


def _owner(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(name.rpartition(".")[0])


def _output_embeddings(model: nn.Module | None) -> nn.Module | None:
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return ask() if ask is not None else None
    except (AttributeError, NotImplementedError):  # the model inherits the method but has no head
        return None
