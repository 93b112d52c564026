"""Where a forward pass uses its parameters, observed per operation and not per layer.

`Watch` is a torch function mode: every torch function that runs inside it reports its arguments. A product with a
watched matrix, or a sum with a watched bias, becomes a `Use`. So it does not matter whether a weight belongs to
`nn.Linear`, to a subclass, to GPT-2's `Conv1D` or to experts in one tensor, or whether a layer uses it without calling
its own forward (the `dt_proj` of Mamba). A parameter in any other operation is reported as `opaque`: its gradients must
be computed in another way, and are never silently zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from datatools.gradients.products import PRODUCTS
from datatools.gradients.uses import Use, View, name_of


class Watch(TorchFunctionMode):
    """Reports each use of watched tensors.

    Args:
        watched: name -> parameter.
        used: (uses, output, whether an input was changed in place) -> output, which may be replaced.
        opaque: receives the names of parameters that were used in another operation, with its name.

    """

    def __init__(
        self, watched: Mapping[str, Tensor], used: Callable[[list[Use], Tensor, bool], Tensor], opaque: dict[str, str]
    ) -> None:
        super().__init__()
        self._views = {id(p): View(name) for name, p in watched.items()}
        self._kept: list[Tensor] = []  # keeps views alive, so that no other tensor can get the id of one
        self._used = used
        self._opaque = opaque

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and record which watched parameters it received."""
        kwargs = kwargs or {}
        seen = self._seen(args, kwargs)
        if not seen:
            return func(*args, **kwargs)
        name = name_of(func)
        if name in _HARMLESS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in _VIEWS and len(seen) == 1 and id(args[0]) in self._views and not _reinterprets(name, args, kwargs):
            return self._look_through(func, args, kwargs)
        find = PRODUCTS.get(name)
        uses = find(self._views, *args, **kwargs) if find is not None else None
        named = {use.view.name for use in uses or ()}
        left = {view.name for view in seen} - named
        result = func(*args, **kwargs)
        changes = name == "__iadd__" or (name.endswith("_") and not name.endswith("__"))
        in_place = changes and isinstance(result, Tensor)
        if in_place and not result.requires_grad:  # the model keeps using this tensor, so it cannot be replaced
            left |= named
        if left and _has_floats(result):
            self._opaque.update(dict.fromkeys(sorted(left - set(self._opaque)), f"it is used in `{name}`"))
        kept = [use for use in uses or () if use.view.name not in left]
        return self._used(kept, result, in_place) if kept else result

    def _seen(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[View]:
        found = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if id(value) in self._views:
                    found.append(self._views[id(value)])
            elif isinstance(value, list | tuple):
                found += [
                    self._views[id(item)] for item in value if isinstance(item, Tensor) and id(item) in self._views
                ]
        return found

    def _look_through(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        view, result = self._views[id(args[0])], func(*args, **kwargs)
        parts = [(None, result)] if isinstance(result, Tensor) else list(enumerate(result))
        for part, tensor in parts:
            if id(tensor) not in self._views:
                step = (func, args[1:], kwargs, part)
                self._views[id(tensor)] = view if name_of(func) in _COPIES else view.then(*step)
                self._kept.append(tensor)
        return result


def _reinterprets(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether `view` reinterprets the bits as another dtype."""
    return name == "view" and any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


def _has_floats(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.is_floating_point() or result.is_complex()
    return isinstance(result, list | tuple) and any(_has_floats(item) for item in result)


# Functions without a gradient: properties of a tensor, and copies that autograd does not follow.
_HARMLESS = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "data", "is_cuda",
    "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes", "names", "_version", "_base", "size", "dim",
    "numel", "stride", "detach", "is_floating_point", "is_complex", "is_contiguous", "element_size", "storage_offset",
    "data_ptr", "__len__", "__hash__", "__repr__", "__format__", "requires_grad_", "zeros_like", "empty_like",
    "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_empty", "new_ones", "new_full", "new_tensor",
}  # fmt: skip
# Functions that select and rearrange elements, so that their gradient follows from the position of each element.
_VIEWS = {
    "T", "mT", "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "select", "narrow", "__getitem__", "index_select", "chunk", "split",
    "tensor_split", "unbind", "view_as", "expand", "expand_as", "contiguous", "clone", "to", "type", "type_as", "float",
    "double", "half", "bfloat16", "alias",
}  # fmt: skip
_COPIES = {"contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16", "alias"}
