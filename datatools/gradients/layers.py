"""Which parameters are matrices of linear layers, determined from the modules alone; nothing is run.

How a parameter is really used is seen in the forward pass (`watch.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA layer y = W x + c B A x.

    Attributes:
        module: the layer.
        name_a: name of the parameter A.
        name_b: name of the parameter B.
        a: A, floating dtype [r, in].
        b: B, floating dtype [out, r].
        scale: c.

    """

    module: nn.Module
    name_a: str
    name_b: str
    a: Float[Tensor, "r in"]
    b: Float[Tensor, "out r"]
    scale: float


def adapters(module: nn.Module) -> list[Adapter]:
    """List the plain LoRA layers of a module: one active adapter, not merged, on a linear layer.

    Args:
        module: the model.

    Returns:
        The layers, with names relative to `module`.

    """
    found = []
    for name, child in module.named_modules():
        lora = _lora_of(child)
        if lora is not None:
            adapter, a, b, scale = lora
            prefix = f"{name}." if name else ""
            found.append(
                Adapter(child, f"{prefix}lora_A.{adapter}.weight", f"{prefix}lora_B.{adapter}.weight", a, b, scale)
            )
    return found


def covered(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Select the weights and biases of linear layers, from which features of language models are made by default.

    These are weights and biases of linear layers (`nn.Linear` and its subclasses, GPT-2's `Conv1D`), of routers, and of
    experts kept in one tensor [experts, ., .]; and A and B of plain LoRA on linear layers. Not included: embeddings and
    parameters tied to them, norms, convolutions, and the matrices of DoRA and other variants. Method "hooks" computes
    those in the same pass, too: name them to have them.

    Args:
        module: the model.
        names: names of parameters.

    Returns:
        Those of `names` that belong to linear layers, in the same order.

    Example:
        >>> module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.LayerNorm(2))
        >>> covered(module, [name for name, _ in module.named_parameters()])
        ['1.weight', '1.bias']

    """
    reachable: set[str] = set()
    embedded = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    inside: list[str] = []
    for name, child in module.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        prefix = f"{name}." if name else ""
        lora = _lora_of(child)
        if lora is not None:
            reachable |= {f"{prefix}lora_{part}.{lora[0]}.weight" for part in "AB"}
        if hasattr(child, "base_layer"):  # the parts of an adapter are added above, or not covered
            inside += [f"{prefix}{part}" for part in ("lora_", "parametrizations", "ranknum")]
            continue
        reachable |= {f"{prefix}{own}" for own in _own_matrices(name, child, embedded)}
    return [name for name in names if name in reachable]


_TABLE = re.compile(r"bias|log|norm|scale|pos", re.IGNORECASE)  # names of parameters used elementwise


def _own_matrices(path: str, child: nn.Module, embedded: set[int]) -> list[str]:
    """List the parameters directly in `child` that are multiplied by vectors, and the bias of a linear layer."""
    if isinstance(child, nn.Embedding | nn.modules.conv._ConvNd):
        return []
    own = {name: p for name, p in child.named_parameters(recurse=False) if id(p) not in embedded}
    if is_linear(child):
        return list(own)
    if "expert" in path.lower():  # matrices of experts may have any name
        return [name for name, p in own.items() if p.ndim > 1 and not _TABLE.search(name)]
    stacks = [name for name, p in own.items() if p.ndim == 3 and min(p.shape) > 1 and not _TABLE.search(name)]
    return [name for name, p in own.items() if p.ndim == 2 and name == "weight"] + stacks


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: `nn.Linear`, a subclass, or transformers' `Conv1D` (weight [in, out]).

    Args:
        module: any module.

    Returns:
        Whether it is.

    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`, GPT-2's linear layer.

    It is recognized by its attributes, because this package knows no model classes.

    Args:
        module: any module.

    Returns:
        Whether it is.

    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _lora_of(module: nn.Module) -> tuple[str, Tensor, Tensor, float] | None:
    """Return (adapter, A [r, in], B [out, r], scale) of a peft LoRA layer with one plain adapter on a linear layer."""
    base, a, b, scaling, active = (
        getattr(module, key, None) for key in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")
    )
    if not isinstance(base, nn.Module) or not is_linear(base) or not a or not b or scaling is None or not active:
        return None
    adapter = active[0]
    if len(active) != 1 or getattr(module, "merged", False) or getattr(module, "lora_variant", None):
        return None
    if getattr(module, "disable_adapters", False) or adapter not in a or adapter not in b:
        return None
    one, two = a[adapter], b[adapter]
    if type(one) is not nn.Linear or type(two) is not nn.Linear or one.bias is not None or two.bias is not None:
        return None
    return adapter, one.weight.detach(), two.weight.detach(), float(scaling[adapter])
