"""Which torch functions are products with a matrix or sums with a bias, and what uses of parameters they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from datatools.gradients.elementwise import broadcast, spread_over
from datatools.gradients.uses import Group, Use, View

Views = Mapping[int, View]


def _by_number(index: Tensor, each: int) -> Callable[[], list[Group]]:
    """Return groups in which token k * each + j sees expert index[k]."""

    def groups() -> list[Group]:
        numbers = index.repeat_interleave(each)
        return [(int(e), (numbers == e).nonzero()[:, 0]) for e in sorted(set(numbers.tolist()))]

    return groups


def _stacked(view: View, stack: Tensor, x: Tensor, **more: Any) -> Use | None:
    """Describe a product of the view [*stack, ., .] with x [*batch, n, in], both broadcast; None if unsupported."""
    batch = broadcast(x.shape[:-2], stack.shape[:-2])
    x = x.expand(*batch, *x.shape[-2:])
    index = view.picked()
    if isinstance(index, Tensor):  # one expert per token, selected by index
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


def _add(views: Views, left: Tensor, right: Any, *, alpha: float = 1, out: Any = None) -> list[Use] | None:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or alpha != 1 or out is not None:
        return None
    if (id(left) in views) == (id(right) in views):
        return None
    bias, _other = (left, right) if id(left) in views else (right, left)
    return [_bias(views[id(bias)], bias, broadcast(left.shape, right.shape))]


def _bias(view: View, bias: Tensor, shape: torch.Size) -> Use:
    """Describe a sum with a bias broadcast to `shape`: tokens are the dimensions along which it is broadcast."""
    index = view.picked()
    if isinstance(index, Tensor) and bias.shape == shape and bias.ndim == 2 and len(view.steps) == 1:
        return Use(view, bias.shape, shape[:1], None, groups=_by_number(index, 1))  # one bias per token
    leading, align = spread_over(bias.shape, shape)
    return Use(view, bias.shape, leading, None, align=align)


PRODUCTS: dict[str, Callable[..., list[Use] | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _matmul),
    "__rmatmul__": _reversed_matmul,
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(
        ("grouped_mm", "_grouped_mm", "transformers.grouped_mm_fallback", "grouped_mm_fallback"), _grouped_mm
    ),
    **dict.fromkeys(("add", "__add__", "__radd__", "add_", "__iadd__"), _add),
}
