"""Embedding tables, whose gradient is the sum of the output gradients of the tokens that picked each entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from datatools.gradients.uses import Use, View


@dataclass(eq=False)
class Lookup(Use):
    """A lookup of entries by number: `x` holds the numbers, int64 [*tokens, 1].

    Attributes:
        padding: number of the entry that gets no gradient; None if each gets one.

    """

    padding: int | None = None

    def add(self, total: Float[Tensor, "b v d"], x: Int64[Tensor, "b n 1"], g: Float[Tensor, "b n d"]) -> None:
        """Add the gradients of the entries that occur; no other entry is touched.

        Args:
            total: gradients of the table, floating dtype [b, v, d], changed in place.
            x: numbers of the entries, int64 [b, n, 1].
            g: output gradients, floating dtype [b, n, d].

        """
        ids, flat = x[..., 0], g.to(total.dtype)
        if self.padding is not None:
            flat = flat * (ids != self.padding)[..., None]
        ids = ids + torch.arange(len(ids), device=ids.device)[:, None] * self.shape[0]
        total.view(-1, self.shape[1]).index_add_(0, ids.reshape(-1), flat.reshape(-1, self.shape[1]))

    def contract(self, x: Int64[Tensor, "b n 1"] | None, g: Float[Tensor, "b n d"]) -> dict[str, Tensor]:
        """Compute the gradient of the table.

        Args:
            x: numbers of the entries, int64 [b, n, 1].
            g: output gradients, floating dtype [b, n, d].

        Returns:
            Name -> gradient of the view [b, v, d], summed over n.

        """
        assert x is not None
        total = g.new_zeros(len(g), *self.shape)
        self.add(total, x, g)
        return {self.view.name: total}


@dataclass(eq=False)
class _Rows(Lookup):
    """A lookup of entries of any shape."""

    def __post_init__(self) -> None:
        count = len(self.tokens)
        self.align = lambda g: g.reshape(*g.shape[:count], -1)

    def add(self, total: Tensor, x: Tensor, g: Tensor) -> None:
        ids = x[..., 0] + torch.arange(len(x), device=x.device)[:, None] * self.shape[0]
        total.view(-1, self.shape[1:].numel()).index_add_(0, ids.reshape(-1), g.to(total.dtype).flatten(0, 1))


def _embedding(
    views: Mapping[int, View], input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> list[Use] | None:  # fmt: skip
    if id(weight) not in views or weight.ndim != 2 or max_norm is not None or scale_grad_by_freq:
        return None  # the first changes the table, the second counts the numbers of all rows together
    padding = None if padding_idx is None else padding_idx % len(weight)
    return [Lookup(views[id(weight)], weight.shape, input.shape, input.detach().long()[..., None], padding=padding)]


def _torch_embedding(
    views: Mapping[int, View], weight: Tensor, indices: Tensor, padding_idx: int = -1, *rest: Any, **more: Any
) -> list[Use] | None:
    if rest or more:
        return None
    return _embedding(views, indices, weight, None if padding_idx < 0 else padding_idx)


def find_embedding(views: Mapping[int, View], *args: Any, **kwargs: Any) -> list[Use] | None:
    """Describe `torch.nn.functional.embedding` or `torch.embedding`, which take their arguments in different orders.

    Args:
        views: id of a tensor -> the watched parameter that it is a view of.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        The use, or None if the gradient of a row does not follow from it.

    """
    first = args[0] if args else kwargs.get("input")
    table_first = isinstance(first, Tensor) and first.is_floating_point()
    return _torch_embedding(views, *args, **kwargs) if table_first else _embedding(views, *args, **kwargs)


def _picked(views: Mapping[int, View], table: Tensor, index: Any) -> list[Use] | None:
    """Describe `table[index]` with an index of several dimensions."""
    if id(table) not in views or not isinstance(index, Tensor) or index.dtype in (torch.bool, torch.uint8):
        return None
    if table.ndim < 2:
        return None
    return [_Rows(views[id(table)], table.shape, index.shape, index.detach().long()[..., None] % len(table))]


LOOKUPS: dict[str, Callable[..., list[Use] | None]] = {"embedding": find_embedding, "__getitem__": _picked}
