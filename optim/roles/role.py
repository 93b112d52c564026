"""What each parameter of a model is, and the memory layout of its matrices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from optim.roles.kinds import Kind, is_table, kind_of
from optim.roles.layouts import layouts


@dataclass(frozen=True)
class Role:
    """What a parameter is, and, for a matrix, its memory layout.

    Args:
        kind: The kind of parameter.
        layout: The fields of `MatrixRule` that describe the layout; empty for [outputs, inputs].
    """

    kind: Kind
    layout: Mapping[str, Any] = field(default_factory=dict)


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
    return {name: Role(kinds[name], found.get(name, {})) for name, _ in named}


def _owner(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(name.rpartition(".")[0])


def _output_embeddings(model: nn.Module | None) -> nn.Module | None:
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return ask() if ask is not None else None
    except (AttributeError, NotImplementedError):  # the model inherits the method but has no head
        return None
