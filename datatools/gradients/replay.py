"""Any other operation with a parameter: its own backward pass is repeated for each row, not that of the whole model.

The rows of the operation are found in its arguments and results: a part of the batch must give the same part of each
result. This is verified for each row before its gradient counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from datatools.gradients.derived import mapped
from datatools.gradients.uses import Use, View


class NotByRows(Exception):
    """A part of the batch does not give the same part of the output."""


@dataclass(eq=False)
class _Slot:
    """A tensor among the arguments: its value, or its view of a parameter; and the dimension along which it is cut."""

    value: Tensor | None
    view: View | None
    dim: int | None


@dataclass(eq=False)
class Replayed(Use):
    """A call that can be repeated for some rows: `x` holds numbers of rows, int64 [count, 1, 1].

    Attributes:
        func: the function.
        slots: its positional and keyword arguments, with a `_Slot` for each tensor.
        watched: the parameters in the call.
        outputs: its floating-point results, each with rows in front.
        dims: the dimension of rows of each result; None if there is only one row.

    """

    func: Callable[..., Any] = field(default=lambda: None)
    slots: tuple[Any, Any] = ((), None)
    watched: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    dims: list[int | None] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients it contributes to."""
        return tuple(self.watched)

    def joined(self, grads: tuple[Float[Tensor, " ..."], ...]) -> Float[Tensor, "count 1 features"]:
        """Put the gradients of all results next to each other, with rows in front.

        Args:
            grads: gradients of the results, floating dtype.

        Returns:
            floating dtype [count, 1, features].

        """
        wide = torch.result_type(grads[0], grads[-1])
        parts = [_front(grad, dim).flatten(1).to(wide) for grad, dim in zip(grads, self.dims, strict=True)]
        return torch.cat(parts, 1)[:, None]

    def contract(self, x: Int64[Tensor, "b n 1"] | None, g: Float[Tensor, "b n features"]) -> dict[str, Tensor]:
        """Compute the gradients of the parameters, row by row.

        Args:
            x: numbers of rows of the results, int64 [b, n, 1].
            g: gradients of the results, floating dtype [b, n, features].

        Returns:
            Name -> gradient of the whole parameter [b, *shape].

        Raises:
            NotByRows: if rows of the results do not follow from rows of the arguments.

        """
        assert x is not None
        found: dict[str, list[Tensor]] = {name: [] for name in self.watched}
        for index, grad in zip(x[..., 0], g, strict=True):
            copies = {name: p.detach().requires_grad_() for name, p in self.watched.items()}
            with torch.enable_grad():
                results = [_front(y, dim) for y, dim in zip(self._run(copies, index), self.dims, strict=True)]
                wanted = [output[index] for output in self.outputs]
                if not all(_equal(y, want) for y, want in zip(results, wanted, strict=True)):
                    raise NotByRows
                pieces = grad.split([y[0].numel() for y in results], 1)
                used = [(y, piece.reshape(y.shape).to(y.dtype)) for y, piece in zip(results, pieces, strict=True)
                        if y.requires_grad]  # fmt: skip
                grads = torch.autograd.grad(
                    [y for y, _ in used], list(copies.values()), [piece for _, piece in used], allow_unused=True
                )
            for (name, copy), one in zip(copies.items(), grads, strict=True):
                found[name].append(torch.zeros_like(copy) if one is None else one.detach())
        return {name: torch.stack(rows) for name, rows in found.items()}

    def _run(self, params: Mapping[str, Tensor], index: Tensor) -> list[Tensor]:
        def fill(slot: _Slot) -> Tensor:
            tensor = slot.value if slot.view is None else slot.view.apply(params[slot.view.name])
            assert tensor is not None
            return tensor if slot.dim is None else tensor.index_select(slot.dim, index.to(tensor.device))

        args, kwargs = mapped(self.slots, fill, _Slot)
        return list(floats(self.func(*args, **kwargs)))

    def fit(self, index: Int64[Tensor, " some"], results: list[Tensor], count: int) -> bool:
        """Find the dimension of rows of each result, by comparing the results for some rows with those for all.

        Args:
            index: numbers of rows, int64 [some].
            results: the results for all rows.
            count: number of rows.

        Returns:
            Whether each result has one.

        """
        try:
            with torch.no_grad():
                parts = self._run(self.watched, index)
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            return False
        self.dims = []
        for part, whole in zip(parts, results, strict=True):
            sized = [
                dim for dim, (few, all_) in enumerate(zip(part.shape, whole.shape, strict=False))
                if all_ == count and few == len(index)
            ]  # fmt: skip
            fitting = [dim for dim in sized if _equal(part, whole.index_select(dim, index.to(whole.device)))]
            if not fitting:
                return False
            self.dims.append(fitting[0])
        return True


def floats(results: Any) -> Iterator[Float[Tensor, " ..."]]:
    """List the floating-point tensors among the results of a function.

    Args:
        results: a tensor, or nested lists and tuples.

    Yields:
        The tensors, of any shape.

    """
    if isinstance(results, Tensor):
        if results.is_floating_point():
            yield results
    elif isinstance(results, list | tuple):
        for item in results:
            yield from floats(item)


def find_rows(
    views: Mapping[int, View], watched: Mapping[str, Tensor], constant: Callable[[Tensor], bool], size: int,
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], results: list[Tensor],
) -> Replayed | None:  # fmt: skip
    """Find how a call is repeated for some of its rows.

    Args:
        views: id of a tensor -> the watched tensor that it is a view of.
        watched: name -> watched tensor.
        constant: whether a tensor is known to be the same for each row.
        size: number of rows of the batch.
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        results: its floating-point results.

    Returns:
        The use, or None if there is no dimension of rows.

    """
    if not results:
        return None
    params: dict[str, Tensor] = {}

    def use_with(dim: int | None, count: int, kinds: set[str]) -> Replayed:
        def slot(tensor: Tensor) -> _Slot:
            view = views.get(id(tensor))
            if view is not None:
                params[view.name] = watched[view.name]
            kind = "watched" if view is not None else "constant" if constant(tensor) else "row"
            at = None
            if dim is not None and kind in kinds:
                fitting = [k for k in range(tensor.ndim) if tensor.shape[k] == count]
                at = dim if dim in fitting else fitting[0] if fitting else None
            return _Slot(tensor.detach() if view is None else None, view, at)

        slots = mapped((args, dict(kwargs)), slot)
        first = next(iter(params))
        use = Replayed(
            View(first), watched[first].shape, torch.Size((count, 1)),
            torch.arange(count, device=results[0].device).view(count, 1, 1),
            func=func, slots=slots, watched=params,
        )  # fmt: skip
        use.align = lambda g: use.joined((g,))
        return use

    if size == 1:
        use = use_with(None, 1, set())
        use.dims = [None] * len(results)
        use.outputs = [_front(result.detach().clone(), None) for result in results]
        return use
    for dim in range(min(3, results[0].ndim)):
        count = results[0].shape[dim]
        if count == 0 or count % size:
            continue
        some = torch.arange(count // size)
        for kinds in ({"row"}, {"row", "constant"}, {"row", "constant", "watched"}):  # the fewest parts first
            use = use_with(dim, count, kinds)
            if use.fit(some, results, count):
                use.outputs = [
                    _front(result.detach().clone(), at) for result, at in zip(results, use.dims, strict=True)
                ]
                return use
    return None


def _front(tensor: Tensor, dim: int | None) -> Tensor:
    """Move rows to the front; without a dimension of rows, all is one row. The result has at least two dimensions."""
    tensor = tensor[None] if dim is None else tensor.movedim(dim, 0)
    return tensor[:, None] if tensor.ndim == 1 else tensor


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    precision = 4 * max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps) ** 0.75
    scale = float(other.detach().abs().nan_to_num(0, 0, 0).max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=precision, atol=precision * scale, equal_nan=True)
