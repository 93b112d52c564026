"""Where a forward pass uses its parameters, observed per operation and not per layer.

`Watch` is a torch function mode: every torch function that runs inside it reports its arguments. A product with a
watched matrix, or a sum with a watched bias, becomes a `Use`. So it does not matter whether a weight belongs to
`nn.Linear`, to a subclass, to GPT-2's `Conv1D` or to experts in one tensor, or whether a layer uses it without calling
its own forward (the `dt_proj` of Mamba). The same holds for convolutions, embeddings, norms and elementwise factors. A
tensor computed from parameters alone is watched like a parameter (`derived.py`), and any other operation whose rows can
be found is repeated row by row (`replay.py`). A parameter in an operation where that is not possible is reported as
opaque: its gradients must be computed in another way, and are never silently zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from datatools.gradients.convolutions import CONVOLUTIONS
from datatools.gradients.derived import Derived, derive, mapped
from datatools.gradients.elementwise import ELEMENTWISE
from datatools.gradients.lookups import LOOKUPS
from datatools.gradients.products import PRODUCTS
from datatools.gradients.replay import Replayed, find_rows, floats
from datatools.gradients.uses import Use, View, name_of

USES = {**PRODUCTS, **ELEMENTWISE, **LOOKUPS, **CONVOLUTIONS}
"""Name of a torch function -> the uses of parameters in a call of it, or None if they must be found in another way."""


class Listener(Protocol):
    """Receives what `Watch` observes."""

    def used(self, uses: list[Use], y: Float[Tensor, " ..."], in_place: bool) -> Float[Tensor, " ..."]:
        """Note uses with one output.

        Args:
            uses: the uses.
            y: their output, of any floating dtype and shape.
            in_place: whether an input was changed in place.

        Returns:
            The output, which may be replaced.

        """

    def joined(self, use: Replayed, outputs: list[Tensor]) -> list[Tensor]:
        """Note a use with several outputs.

        Args:
            use: the use.
            outputs: its outputs.

        Returns:
            The outputs, which may be replaced.

        """

    def derived(self, made: Derived) -> None:
        """Note a tensor that was computed from watched tensors alone.

        Args:
            made: the tensor.

        """

    def opaque(self, name: str, why: str) -> None:
        """Note that gradients of a watched tensor must be computed in another way.

        Args:
            name: name of the tensor.
            why: the reason, in words.

        """


class Watch(TorchFunctionMode):
    """Reports each use of watched tensors.

    Args:
        watched: name -> parameter.
        listener: receives the uses.
        size: number of rows of the batch.
        constants: tensors that are the same for each row, such as the other parameters and the buffers of the module.

    """

    def __init__(
        self, watched: Mapping[str, Tensor], listener: Listener, size: int, constants: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self._views = {id(p): View(name) for name, p in watched.items()}
        self._watched = dict(watched)
        self._kept: list[Tensor] = []  # keeps views alive, so that no other tensor can get the id of one
        self._constants = {id(tensor): weakref.ref(tensor) for tensor in constants}
        self._listener = listener
        self._size = size
        self._made = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and record which watched parameters it received."""
        kwargs = kwargs or {}
        seen: list[View] = []
        others: list[Tensor] = []
        for value in (*args, *kwargs.values()):
            self._sort(value, seen, others)
        name = name_of(func)
        alone = all(self._constant(tensor) for tensor in others)
        if not seen or name in _HARMLESS or not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            if alone:
                self._remember(result)
            return result
        rearranges = name in _VIEWS and not _reinterprets(name, args, kwargs) and not _looks_up(name, args)
        if rearranges and len(seen) == 1 and id(args[0]) in self._views:
            return self._look_through(func, args, kwargs)
        changes = name in _CHANGES or (name.endswith("_") and not name.endswith("__"))
        if alone and not changes:
            result = func(*args, **kwargs)
            if self._derives(func, args, kwargs, result):
                return result
        uses = self._find(name, args, kwargs)
        if not changes:  # with fewer tokens than rows, a tensor is larger than a parameter: it has rows of its own
            uses = [use for use in uses if use.routed or use.tokens.numel() >= self._size]
        named = {use.view.name for use in uses}
        left = {view.name for view in seen} - named
        result = func(*args, **kwargs)
        in_place = changes and isinstance(result, Tensor)
        if in_place and not result.requires_grad:  # the model keeps using this tensor, so it cannot be replaced
            left |= named
        if left and not changes:
            outputs = list(floats(result))
            use = find_rows(self._views, self._watched, self._constant, self._size, func, args, kwargs, outputs)
            if use is not None and isinstance(result, Tensor):
                return self._listener.used([use], result, False)
            if use is not None:
                new = iter(self._listener.joined(use, outputs))
                return mapped(result, lambda tensor: next(new) if tensor.is_floating_point() else tensor)
        if left and (_has_floats(result) or changes):
            for one in sorted(left):
                self._listener.opaque(one, f"it is used in `{name}`")
        kept = [use for use in uses if use.view.name not in left]
        return self._listener.used(kept, result, in_place) if kept else result

    def __enter__(self) -> Watch:
        """Begin to watch."""
        self._apply = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(self._noted)  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _noted(self, function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        """Run a function with a backward pass of its own; parameters among its arguments are opaque.

        Torch functions modes do not see such functions. Comparing one row with the definition is not enough to find
        them: a row may not reach them, as with experts.
        """
        seen: list[View] = []
        self._sort([*args, *kwargs.values()], seen, [])
        for view in seen:
            self._listener.opaque(view.name, f"it is used in `{function.__name__}`, whose backward pass is its own")
        return self._apply.__get__(None, function)(*args, **kwargs)

    def _sort(self, value: Any, seen: list[View], others: list[Tensor]) -> None:
        if isinstance(value, Tensor):
            view = self._views.get(id(value))
            if view is None:
                others.append(value)
            else:
                seen.append(view)
        elif isinstance(value, list | tuple):
            for item in value:
                self._sort(item, seen, others)

    def _constant(self, tensor: Tensor) -> bool:
        kept = self._constants.get(id(tensor))
        return kept is not None and kept() is tensor and not tensor.requires_grad

    def _remember(self, result: Any) -> None:
        for tensor in [result] if isinstance(result, Tensor) else result if isinstance(result, list | tuple) else ():
            if isinstance(tensor, Tensor):
                self._constants[id(tensor)] = weakref.ref(tensor)

    def _find(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Use]:
        find = USES.get(name)
        if find is None:
            return []
        try:
            return find(self._views, *args, **kwargs) or []
        except TypeError:  # called with other arguments than these functions usually get
            return []

    def _derives(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Watch the results of a call without anything from the batch; return whether nothing more is to be done."""
        results = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, list | tuple) else []
        if not results or any(not isinstance(tensor, Tensor) or id(tensor) in self._views for tensor in results):
            return False
        largest = max((p.numel() for p in self._watched.values()), default=0)
        if any(tensor.numel() > max(largest, _LARGE // self._size) for tensor in results):
            return False
        self._made += 1
        try:
            made = derive(f"<{self._made}>", func, args, kwargs, self._views, self._watched, results)
        except (RuntimeError, ValueError, TypeError):
            return False
        self._remember(result)
        for one in made:
            self._constants.pop(id(one.value), None)
            self._views[id(one.value)] = View(one.name)
            self._watched[one.name] = one.value
            self._kept.append(one.value)
            self._listener.derived(one)
        return True

    def _look_through(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        view, result = self._views[id(args[0])], func(*args, **kwargs)
        parts = [(None, result)] if isinstance(result, Tensor) else list(enumerate(result))
        for part, tensor in parts:
            if id(tensor) not in self._views:
                step = (func, args[1:], kwargs, part)
                self._views[id(tensor)] = view if name_of(func) in _COPIES else view.then(*step)
                self._kept.append(tensor)
        return result


def _reinterprets(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether `view` reinterprets the bits as another dtype."""
    return name == "view" and any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


def _looks_up(name: str, args: tuple[Any, ...]) -> bool:
    """Return whether entries are picked by an index of several dimensions, as an embedding does."""
    index = args[1] if name == "__getitem__" and len(args) > 1 else None
    return isinstance(index, Tensor) and index.ndim > 1 and not index.is_floating_point() and index.dtype != torch.bool


def _has_floats(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.is_floating_point() or result.is_complex()
    return isinstance(result, list | tuple) and any(_has_floats(item) for item in result)


_CHANGES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__", "__imatmul__"}
_LARGE = 1 << 24  # numbers in the per-row gradients of a derived tensor
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
