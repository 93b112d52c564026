"""Which parameters the fast method can see, told by the modules alone; nothing is run.

What a parameter is really used for is seen in the forward pass (`uses`); here is only what is worth trying.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA layer y = W x + c B A x: its module, the names of A [r, in] and B [out, r], and c."""

    module: nn.Module
    name_a: str
    name_b: str
    a: Tensor
    b: Tensor
    scale: float


def adapters(module: nn.Module) -> list[Adapter]:
    """The plain LoRA layers of `module`: one adapter in force, not merged, over a linear layer."""
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
    """Those of `names` whose per-example gradients `hooks` forms without a pass for each row.

    Weights and biases of linear layers (`nn.Linear` and its subclasses, GPT-2's `Conv1D`), of routers, and of experts
    kept in one tensor [experts, ., .]; A and B of plain LoRA over linear layers. Left out, though `hooks` gives them
    too, by one pass a row: embeddings and what is tied to them, norms, convolutions, the matrices of DoRA and other
    variants. A layer that uses its weight in a way nobody foresaw is claimed here and still right: see
    `per_sample_grads`.
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
        if hasattr(child, "base_layer"):  # an adapter: its own parts, plain or not, are named above or not at all
            inside += [f"{prefix}{part}" for part in ("lora_", "parametrizations", "ranknum")]
            continue
        reachable |= {f"{prefix}{own}" for own in _own_matrices(name, child, embedded)}
    return [name for name in names if name in reachable]


_TABLE = re.compile(r"bias|log|norm|scale|pos", re.IGNORECASE)  # names of what is added or multiplied number by number


def _own_matrices(path: str, child: nn.Module, embedded: set[int]) -> list[str]:
    """Names of the parameters directly in `child` that are multiplied with vectors, and of a linear layer's bias."""
    if isinstance(child, nn.Embedding | nn.modules.conv._ConvNd):
        return []
    own = {name: p for name, p in child.named_parameters(recurse=False) if id(p) not in embedded}
    if is_linear(child):
        return list(own)
    if "expert" in path.lower():  # their matrices have any name
        return [name for name, p in own.items() if p.ndim > 1 and not _TABLE.search(name)]
    stacks = [name for name, p in own.items() if p.ndim == 3 and min(p.shape) > 1 and not _TABLE.search(name)]
    return [name for name, p in own.items() if p.ndim == 2 and name == "weight"] + stacks


def is_linear(module: nn.Module) -> bool:
    """Is it a linear layer: `nn.Linear` or a subclass, or transformers' `Conv1D`, which keeps [inputs, outputs]?"""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Is it transformers' `Conv1D` (GPT-2's linear layer)? Told by its fields: no model class is known here."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _lora_of(module: nn.Module) -> tuple[str, Tensor, Tensor, float] | None:
    """(adapter, A [r, in], B [out, r], scale) of a peft LoRA layer over a linear layer with one plain adapter."""
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
