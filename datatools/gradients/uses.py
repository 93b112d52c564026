"""Uses of parameters: a product with a matrix or a sum with a bias, and how they give the gradient of the parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

Group = tuple[int, Tensor | slice]
"""The number of an expert, and the flattened tokens that it sees."""


_EXCHANGES = {"transpose", "swapaxes", "swapdims", "permute", "mT"}
"""Functions that may exchange the last two dimensions."""


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function, or of the tensor attribute that it reads.

    Args:
        func: a function as `__torch_function__` receives it.

    Returns:
        The name, or an empty string.

    """
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # an attribute of tensors, such as `.T`
        return str(getattr(getattr(func, "__self__", None), "__name__", "")) if name == "__get__" else name
    return str(name)


@dataclass(frozen=True)
class View:
    """A watched parameter after functions that only select and rearrange its elements.

    Attributes:
        name: name of the parameter.
        steps: each function with its other arguments, and which of several results was taken.

    """

    name: str
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None], ...] = ()

    def then(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], part: int | None
    ) -> View:
        """Append one more function.

        Args:
            function: the function.
            args: its positional arguments after the tensor.
            kwargs: its keyword arguments.
            part: which of its results was taken; None if it has one.

        Returns:
            The new view.

        """
        return View(self.name, (*self.steps, (function, args, kwargs, part)))

    def apply(self, whole: Shaped[Tensor, " ..."], start: int = 0) -> Shaped[Tensor, " ..."]:
        """Apply the steps to another tensor.

        Args:
            whole: a tensor of any dtype, in the shape of the parameter or, from `start` on, of the intermediate result.
            start: the first step to apply.

        Returns:
            The result, of any shape.

        """
        for function, args, kwargs, part in self.steps[start:]:
            result = function(whole, *args, **kwargs)
            whole = result if part is None else result[part]
        return whole

    def picked(self) -> int | Int[Tensor, " n"] | None:
        """Return the index along the first dimension if the first step is `parameter[index]`: one or one per token.

        Returns:
            A number, integers [n], or None.

        """
        if not self.steps or name_of(self.steps[0][0]) != "__getitem__":
            return None
        index = self.steps[0][1][0]
        if isinstance(index, int) and not isinstance(index, bool):
            return index
        if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
            return int(index) if index.ndim == 0 else index if index.ndim == 1 else None
        return None

    def swapped(self) -> bool | None:
        """Return whether the last two dimensions of a stack of matrices are exchanged.

        Returns:
            Whether they are; None if anything else was done to the stack.

        """
        start = int(isinstance(self.picked(), Tensor))
        if any(name_of(step[0]) not in _EXCHANGES for step in self.steps[start:]):
            return None
        shape = tuple(self.apply(torch.empty(1, 2, 3), start).shape)
        return shape == (1, 3, 2) if shape in ((1, 2, 3), (1, 3, 2)) else None


@dataclass(eq=False)
class Use:
    """One use of parameters: its input, and how the gradient of its output becomes the gradient of the parameters.

    With g, the gradient of the output, rearranged to [*tokens, out] by `align`, a product adds sum_tokens g x^T (to a
    matrix stored as [out, in]; x g^T to one stored as [in, out]), and a bias adds sum_tokens g.

    Attributes:
        view: the parameter, as the use sees it.
        shape: shape of the view.
        tokens: leading dimensions of x and g: the tokens, in the order in which the model has them.
        x: input, floating dtype [*tokens, in]; None for a bias.
        out_first: whether the matrix is stored as [out, in].
        align: gradient of the output -> [*tokens, out].
        groups: returns experts and their tokens if the parameter is part of a stack; None if every token sees the view.
        places: position in the parameter of each element of the view, int64; computed when needed.

    """

    view: View
    shape: torch.Size
    tokens: torch.Size
    x: Float[Tensor, "*tokens in"] | None
    out_first: bool = True
    align: Callable[[Tensor], Tensor] = lambda g: g
    groups: Callable[[], list[Group]] | None = None
    places: Int64[Tensor, "*shape"] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients it contributes to."""
        return (self.view.name,)

    @property
    def routed(self) -> bool:
        """Whether its tokens may be different ones in each batch."""
        return self.groups is not None or self.view.picked() is not None

    def contract(self, x: Float[Tensor, "b n in"] | None, g: Float[Tensor, "b n out"]) -> dict[str, Tensor]:
        """Compute the gradient of the view from inputs and output gradients.

        Args:
            x: inputs, floating dtype [b, n, in]; None for a bias.
            g: output gradients, floating dtype [b, n, out].

        Returns:
            Name -> gradient of the view [b, *shape], summed over n.

        """
        if x is None:
            return {self.view.name: g.sum(1).view(len(g), *self.shape) if self.groups is None else g.sum(1)}
        g = g.to(x.dtype)  # they differ under autocast
        return {self.view.name: g.mT @ x if self.out_first else x.mT @ g}

    def scatter(
        self,
        total: Float[Tensor, " b *shape"],
        rows: slice | int,
        grad: Float[Tensor, " rows *view"],
        expert: int | None,
    ) -> None:
        """Add the gradient of the view to the gradient of the parameter.

        Args:
            total: gradients of the parameter, floating dtype [b, *shape], changed in place.
            rows: which of the b rows.
            grad: gradients of the view, floating dtype [rows, *view].
            expert: number of the expert in the stack; None for the whole view.

        """
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
        if self.places is None:  # position in the parameter of each element of the view
            shape = at.shape[1:]
            self.places = self.view.apply(torch.arange(shape.numel(), device=at.device).view(shape), start)
        places = self.places if expert is None else self.places.flatten(0, -3)[expert]
        whole = torch.zeros(len(at), at[0].numel(), dtype=at.dtype, device=at.device)
        whole.index_add_(1, places.reshape(-1), grad.reshape(len(at), -1).to(at.dtype))
        at += whole.view(at.shape)
