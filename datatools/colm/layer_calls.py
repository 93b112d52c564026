"""Record the calls of decoder layers and of the linear layers inside them, with outputs that are part of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from datatools.gradients.layers import is_conv1d


@dataclass
class BlockCall:
    """One call of a decoder layer.

    Attributes:
        name: name of the layer in the model.
        module: the layer.
        matrices: (name, output) of each call of a linear layer inside, in order; outputs have a floating dtype [...,
            out].
        output: the hidden states that the layer returns, floating dtype [..., d].
        softmax: whether a softmax was computed inside.

    """

    name: str
    module: nn.Module
    matrices: list[tuple[str, Tensor]] = field(default_factory=list)
    output: Float[Tensor, " ..."] | None = None
    softmax: bool = False


class Unclipped(TorchFunctionMode):
    """Inside, clipping (`clip_qkv`) has a derivative everywhere: other tokens may be within the limits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("clamp", "clip") and isinstance(found, Tensor) and found.requires_grad:
            return args[0] + (found - args[0]).detach()
        return found


class FixedWeights(Unclipped):
    """Inside, attention weights have no derivative: softmax is detached, fused attention gets detached q and k.

    Args:
        calls: recorded calls; the last one is marked as having a softmax.

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
    """List the decoder layers of a model: the entries of every outermost `nn.ModuleList`.

    Args:
        model: the model.

    Returns:
        Name -> layer.

    """
    outer: str | None = None  # modules are listed depth first
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (outer is not None and name.startswith(f"{outer}.")):
            outer = name
            found |= {f"{name}.{i}": layer for i, layer in enumerate(module)}
    return found


def matrices_of(model: nn.Module) -> dict[str, nn.Module]:
    """List the layers that map features to features: linear layers of any kind, and adapters around them.

    Args:
        model: the model.

    Returns:
        Name -> module.

    """
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
    """Return the number of outputs of a linear layer: plain, quantized, with an adapter, or GPT-2's Conv1D.

    Args:
        module: any module.

    Returns:
        The number of outputs, or None for other modules.

    """
    base: Any = getattr(module, "base_layer", module)
    if is_conv1d(base):
        return int(base.nf)
    out = getattr(base, "out_features", None)
    return out if isinstance(out, int) and hasattr(base, "in_features") else None


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[BlockCall]]:
    """Record the calls of decoder layers in the block. Outputs of linear layers are part of the graph, and copied.

    Args:
        model: the model.

    Yields:
        The calls so far, in order.

    """
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
            return y.clone()  # the model may change it in place

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


def first_tensor(output: Any) -> Float[Tensor, " ..."] | None:
    """Find the hidden states in the output of a layer.

    Args:
        output: a tensor, or a nested tuple, list or mapping of tensors.

    Returns:
        The first floating-point tensor, or None.

    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((t for t in map(first_tensor, values) if t is not None), None)
