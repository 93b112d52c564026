"""Tensors that are computed from parameters alone, such as `1 + weight`, B @ A, or a normalized weight.

Such a tensor is a parameter of its own for the forward pass. When its per-row gradients have arrived, they go on to the
parameters that it was computed from, through a small graph that belongs to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.gradients.uses import View


@dataclass(eq=False)
class Derived:
    """A tensor computed from watched tensors and constants.

    Attributes:
        name: a name that no parameter has.
        value: the tensor.
        parents: watched tensors that it was computed from -> copies of them, at which its graph starts.
        twin: the same tensor, with its graph.

    """

    name: str
    value: Float[Tensor, "*shape"]
    parents: dict[str, Tensor]
    twin: Float[Tensor, "*shape"]

    def push(self, total: Float[Tensor, " b *shape"]) -> dict[str, Tensor]:
        """Compute the gradients of the parents from those of this tensor.

        Args:
            total: gradients of this tensor, floating dtype [b, *shape].

        Returns:
            Parent -> gradients [b, *its shape]; without parents that it does not depend on.

        """
        leaves = list(self.parents.values())
        total = total.to(self.twin.dtype)

        def back(grad: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                self.twin, leaves, grad, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        with warnings.catch_warnings():  # torch warns where it loops over an operation that it cannot batch
            warnings.filterwarnings("ignore", message="There is a performance drop")
            try:
                found = back(total, True)
            except RuntimeError:  # an operation whose backward pass cannot be batched at all
                rows = [back(row, False) for row in total]
                found = tuple(
                    None if column[0] is None else torch.stack(list(column)) for column in zip(*rows, strict=True)
                )
        return {name: grad for name, grad in zip(self.parents, found, strict=True) if grad is not None}


def mapped(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Replace each tensor, or each object of another class, in nested lists, tuples and dictionaries.

    Args:
        value: arguments of a function.
        change: object -> what takes its place.
        kind: class of the objects.

    Returns:
        The arguments with replaced objects.

    Example:
        >>> mapped([1, (torch.tensor(2), "a")], lambda tensor: tensor.item() + 1)
        [1, (3, 'a')]

    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change, kind) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change, kind) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, change, kind) for key, item in value.items()}
    return value


def derive(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], views: Mapping[int, View],
    watched: Mapping[str, Tensor], results: list[Tensor],
) -> list[Derived]:  # fmt: skip
    """Repeat a call with copies of the watched tensors that require a gradient.

    Args:
        name: how the names of the results begin.
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        views: id of a tensor -> the watched tensor that it is a view of.
        watched: name -> watched tensor.
        results: what the function has returned.

    Returns:
        The results that depend on watched tensors differentiably.

    """
    copies: dict[str, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        view = views.get(id(tensor))
        if view is None:
            return tensor.detach()
        if view.name not in copies:
            copies[view.name] = watched[view.name].detach().requires_grad_()
        return view.apply(copies[view.name])

    with torch.enable_grad():
        found = func(*mapped(args, change), **mapped(dict(kwargs), change))
    twins = [found] if isinstance(found, Tensor) else list(found)
    return [
        Derived(f"{name}.{k}", value, copies, twin)
        for k, (value, twin) in enumerate(zip(results, twins, strict=True))
        if isinstance(twin, Tensor) and twin.requires_grad
    ]
