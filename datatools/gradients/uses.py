"""Where a forward pass uses its parameters, seen operation by operation and not layer by layer.

`Watch` is a mode of torch: every torch function that runs inside it reports its arguments. A product with a watched
matrix, or a sum with a watched bias, becomes a `Use`: what went in, and how the gradient of what came out, times what
went in, gives the gradient of the parameter. So it makes no difference whether a weight belongs to `nn.Linear`, to a
subclass of it, to GPT-2's `Conv1D`, to experts in one tensor, or is used by a layer that never calls its own forward
(the `dt_proj` of Mamba). A parameter that takes part in anything else is reported as `opaque`: its gradients must come
from elsewhere, and are never silently zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Group = tuple[int, Tensor | slice]
"""An expert, and which of the flattened tokens it sees."""


@dataclass(frozen=True)
class View:
    """A watched parameter, seen through functions that only pick and arrange its numbers."""

    name: str
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None], ...] = ()
    """Each function with its other arguments, and which of several results was taken."""

    def then(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], part: int | None
    ) -> View:
        """The view, seen through one more function."""
        return View(self.name, (*self.steps, (function, args, kwargs, part)))

    def apply(self, whole: Tensor, start: int = 0) -> Tensor:
        """The same view (from its step `start` on) of another tensor."""
        for function, args, kwargs, part in self.steps[start:]:
            result = function(whole, *args, **kwargs)
            whole = result if part is None else result[part]
        return whole

    def picked(self) -> int | Tensor | None:
        """The index along the first dimension, where the first step is `parameter[index]`: an expert or one a token."""
        if not self.steps or _name(self.steps[0][0]) != "__getitem__":
            return None
        index = self.steps[0][1][0]
        if isinstance(index, int) and not isinstance(index, bool):
            return index
        if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
            return int(index) if index.ndim == 0 else index if index.ndim == 1 else None
        return None

    def swapped(self) -> bool | None:
        """Of a stack of matrices: are the last two dimensions exchanged? None if anything else was done to it."""
        start = int(isinstance(self.picked(), Tensor))
        if any(_name(step[0]) not in _EXCHANGES for step in self.steps[start:]):
            return None
        shape = tuple(self.apply(torch.empty(1, 2, 3), start).shape)
        return shape == (1, 3, 2) if shape in ((1, 2, 3), (1, 3, 2)) else None


@dataclass(eq=False)
class Use:
    """One use of parameters: what went in, and how the gradient of what came out becomes theirs.

    With g, the gradient of the output, brought to [*tokens, out] by `align`, a product adds sum_tokens g x^T (to a
    matrix kept [out, in]; x g^T to one kept [in, out]), and a bias adds sum_tokens g.
    """

    view: View
    shape: torch.Size
    """Of the view."""
    tokens: torch.Size
    """Leading dimensions of x and g: the tokens, in whatever order the model has them."""
    x: Tensor | None
    """[*tokens, in], or None for a bias."""
    out_first: bool = True
    align: Callable[[Tensor], Tensor] = lambda g: g
    groups: Callable[[], list[Group]] | None = None
    """Experts and their tokens, where the parameter is one of a stack; None where every token sees the whole view."""
    places: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it adds to."""
        return (self.view.name,)

    @property
    def routed(self) -> bool:
        """May its tokens be other ones of the batch each time?"""
        return self.groups is not None or self.view.picked() is not None

    def contract(self, x: Tensor | None, g: Tensor) -> dict[str, Tensor]:
        """x [b, n, in] and g [b, n, out] -> name -> gradient of the view [b, *shape], summed over n."""
        if x is None:
            return {self.view.name: g.sum(1).view(len(g), *self.shape) if self.groups is None else g.sum(1)}
        g = g.to(x.dtype)  # they differ under autocast
        return {self.view.name: g.mT @ x if self.out_first else x.mT @ g}

    def scatter(self, total: Tensor, rows: slice | int, grad: Tensor, expert: int | None) -> None:
        """total [b, *shape of the parameter] += grad [rows, *shape of the view], seen back through the view."""
        steps, at = self.view.steps, total[rows]
        picked, start = self.view.picked(), 0
        if expert is not None and (self.x is None or self.view.swapped() is not None):
            at[:, expert] += grad.mT if self.x is not None and self.view.swapped() else grad
            return
        if isinstance(picked, int):
            at, start = at[:, picked], 1
        if start == len(steps):
            at += grad
            return
        if self.places is None:  # where each number of the view stands in the parameter
            shape = at.shape[1:]
            self.places = self.view.apply(torch.arange(shape.numel(), device=at.device).view(shape), start)
        places = self.places if expert is None else self.places.flatten(0, -3)[expert]
        whole = torch.zeros(len(at), at[0].numel(), dtype=at.dtype, device=at.device)
        whole.index_add_(1, places.reshape(-1), grad.reshape(len(at), -1).to(at.dtype))
        at += whole.view(at.shape)


class Watch(TorchFunctionMode):
    """Reports each use of the tensors `watched` (name -> parameter) to `used`, which may replace the output.

    used: (uses, output, whether an input was changed in place) -> output. opaque: gets the names of parameters that
    took part in something else, with what it was.
    """

    def __init__(
        self, watched: Mapping[str, Tensor], used: Callable[[list[Use], Tensor, bool], Tensor], opaque: dict[str, str]
    ) -> None:
        super().__init__()
        self._views = {id(p): View(name) for name, p in watched.items()}
        self._kept: list[Tensor] = []  # views stay alive, or another tensor could get the id of one
        self._used = used
        self._opaque = opaque

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and note which watched parameters it got."""
        kwargs = kwargs or {}
        seen = self._seen(args, kwargs)
        if not seen:
            return func(*args, **kwargs)
        name = _name(func)
        if name in _HARMLESS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in _VIEWS and len(seen) == 1 and id(args[0]) in self._views and not _reinterprets(name, args, kwargs):
            return self._look_through(func, args, kwargs)
        find = _PRODUCTS.get(name)
        uses = find(self._views, *args, **kwargs) if find is not None else None
        named = {use.view.name for use in uses or ()}
        left = {view.name for view in seen} - named
        result = func(*args, **kwargs)
        changes = name == "__iadd__" or (name.endswith("_") and not name.endswith("__"))
        in_place = changes and isinstance(result, Tensor)
        if in_place and not result.requires_grad:  # the model goes on with this very tensor: it cannot be replaced
            left |= named
        if left and _has_floats(result):
            self._opaque.update(dict.fromkeys(sorted(left - set(self._opaque)), f"it takes part in `{name}`"))
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
                self._views[id(tensor)] = view if _name(func) in _COPIES else view.then(*step)
                self._kept.append(tensor)
        return result


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # an attribute of tensors, such as `.T`
        return str(getattr(getattr(func, "__self__", None), "__name__", "")) if name == "__get__" else name
    return str(name)


def _reinterprets(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Does `view` read the bits as another type?"""
    return name == "view" and any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))


def _has_floats(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.is_floating_point() or result.is_complex()
    return isinstance(result, list | tuple) and any(_has_floats(item) for item in result)


# What carries no gradient: facts about a tensor, and copies that autograd does not follow.
_HARMLESS = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "data", "is_cuda",
    "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes", "names", "_version", "_base", "size", "dim",
    "numel", "stride", "detach", "is_floating_point", "is_complex", "is_contiguous", "element_size", "storage_offset",
    "data_ptr", "__len__", "__hash__", "__repr__", "__format__", "requires_grad_", "zeros_like", "empty_like",
    "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_empty", "new_ones", "new_full", "new_tensor",
}  # fmt: skip
# What picks and arranges numbers, so that its gradient is found from where each number went.
_VIEWS = {
    "T", "mT", "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "select", "narrow", "__getitem__", "index_select", "chunk", "split",
    "tensor_split", "unbind", "view_as", "expand", "expand_as", "contiguous", "clone", "to", "type", "type_as", "float",
    "double", "half", "bfloat16", "alias",
}  # fmt: skip
_EXCHANGES = {"transpose", "swapaxes", "swapdims", "permute", "mT"}
_COPIES = {"contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16", "alias"}

Views = Mapping[int, View]


def _by_number(index: Tensor, each: int) -> Callable[[], list[Group]]:
    """Token k * each + j sees expert index[k]."""

    def groups() -> list[Group]:
        numbers = index.repeat_interleave(each)
        return [(int(e), (numbers == e).nonzero()[:, 0]) for e in sorted(set(numbers.tolist()))]

    return groups


def _stacked(view: View, stack: Tensor, x: Tensor, **more: Any) -> Use | None:
    """A product of the view [*stack, ., .] with x [*batch, n, in], both stretched; None if it is not understood."""
    batch = _broadcast(x.shape[:-2], stack.shape[:-2])
    x = x.expand(*batch, *x.shape[-2:])
    index = view.picked()
    if isinstance(index, Tensor):  # one expert per token, picked by number
        if x.ndim != 3 or view.swapped() is None:
            return None
        return _of(view, stack, x, groups=_by_number(index, x.shape[1]), **more)

    def groups() -> list[Group]:
        count = stack.shape[:-2].numel()
        numbers = torch.arange(count).view(*stack.shape[:-2], 1).expand(*batch, x.shape[-2]).reshape(-1)
        return [(e, (numbers == e).nonzero()[:, 0]) for e in range(count)]

    return _of(view, stack, x, groups=groups, **more)


def _linear(views: Views, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use] | None:
    found = []
    if id(weight) in views:
        if weight.ndim != 2 or id(x) in views:
            return None
        found.append(_of(views[id(weight)], weight, x))
    if bias is not None and id(bias) in views:
        found.append(Use(views[id(bias)], bias.shape, x.shape[:-1], None))
    return found


def _of(view: View, matrix: Tensor, x: Tensor, **more: Any) -> Use:
    return Use(view, matrix.shape, more.pop("tokens", x.shape[:-1]), x.detach(), **more)


def _matmul(views: Views, left: Tensor, right: Tensor, **_: Any) -> list[Use] | None:
    if id(left) in views and id(right) in views:
        return None
    if id(right) in views:
        if right.ndim == 2 and left.ndim >= 1:
            return [_of(views[id(right)], right, left, out_first=False)]
        use = _stacked(views[id(right)], right, left, out_first=False) if min(left.ndim, right.ndim) > 2 else None
        return None if use is None else [use]
    if left.ndim == 2 and right.ndim >= 2:
        return [_of(views[id(left)], left, right.mT, align=lambda g: g.mT)]
    if left.ndim == 2 and right.ndim == 1:
        return [_of(views[id(left)], left, right)]
    use = _stacked(views[id(left)], left, right.mT, align=lambda g: g.mT) if min(left.ndim, right.ndim) > 2 else None
    return None if use is None else [use]


def _reversed_matmul(views: Views, right: Tensor, left: Tensor) -> list[Use] | None:
    return _matmul(views, left, right)


def _addmm(views: Views, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1,
           **_: Any) -> list[Use] | None:  # fmt: skip
    if alpha != 1 or beta != 1:
        return None
    found = (_matmul(views, left, right) or []) if id(left) in views or id(right) in views else []
    if id(bias) in views:
        found.append(_bias(views[id(bias)], bias, torch.Size((*left.shape[:-1], right.shape[-1]))))
    return found


def _grouped_mm(views: Views, x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
                out_dtype: Any = None, **_: Any) -> list[Use] | None:  # fmt: skip
    if id(weight) not in views or offs is None or x.ndim != 2 or weight.ndim != 3:
        return None
    if views[id(weight)].picked() is not None:
        return None

    def segments() -> list[Group]:
        ends = offs.tolist()
        return [
            (e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start
        ]

    return [_of(views[id(weight)], weight, x, out_first=False, groups=segments)]


def _broadcast(*shapes: torch.Size) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _add(views: Views, left: Tensor, right: Any, *, alpha: float = 1, out: Any = None) -> list[Use] | None:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or alpha != 1 or out is not None:
        return None
    if (id(left) in views) == (id(right) in views):
        return None
    bias, _other = (left, right) if id(left) in views else (right, left)
    return [_bias(views[id(bias)], bias, _broadcast(left.shape, right.shape))]


def _bias(view: View, bias: Tensor, shape: torch.Size) -> Use:
    """A sum with a bias that is spread over the output's `shape`: tokens are the dimensions that it is spread along."""
    index = view.picked()
    if isinstance(index, Tensor) and bias.shape == shape and bias.ndim == 2 and len(view.steps) == 1:
        return Use(view, bias.shape, shape[:1], None, groups=_by_number(index, 1))  # one bias per token
    own = (1,) * (len(shape) - bias.ndim) + tuple(bias.shape)
    tokens = [k for k in range(len(shape)) if own[k] == 1 and shape[k] != 1]
    features = [k for k in range(len(shape)) if k not in tokens]
    leading = torch.Size(shape[k] for k in tokens)
    width = math.prod(shape[k] for k in features)
    return Use(view, bias.shape, leading, None, align=lambda g: g.permute(*tokens, *features).reshape(*leading, width))


_PRODUCTS: dict[str, Callable[..., list[Use] | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _matmul),
    "__rmatmul__": _reversed_matmul,
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(
        ("grouped_mm", "_grouped_mm", "transformers.grouped_mm_fallback", "grouped_mm_fallback"), _grouped_mm
    ),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__"), _add),
}
