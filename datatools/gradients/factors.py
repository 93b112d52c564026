"""Per-sample gradients of a matrix as the factors that they are products of, for those who need no whole gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Size, Tensor


@dataclass(eq=False)
class Product:
    """A sum over n tokens of products of two vectors.

    Attributes:
        rows: one vector of each token, floating dtype [b, n, r].
        columns: the other, floating dtype [b, n, c].

    """

    rows: Float[Tensor, "b n r"]
    columns: Float[Tensor, "b n c"]

    def part(self, start: int, stop: int) -> Float[Tensor, "b some c"]:
        """Compute some rows of the matrices.

        Args:
            start: first row.
            stop: end of the rows, exclusive.

        Returns:
            floating dtype [b, stop - start, c].

        """
        return self.rows[:, :, start:stop].mT @ self.columns


@dataclass(eq=False)
class Picks:
    """A sum over n tokens of vectors that are added to one row each, as an embedding does.

    Attributes:
        ids: the row of each token, int64 [b, n].
        columns: its vector, floating dtype [b, n, c].

    """

    ids: Int64[Tensor, "b n"]
    columns: Float[Tensor, "b n c"]

    def part(self, start: int, stop: int) -> Float[Tensor, "b some c"]:
        """Compute some rows of the matrices.

        Args:
            start: first row.
            stop: end of the rows, exclusive.

        Returns:
            floating dtype [b, stop - start, c].

        """
        b, _, c = self.columns.shape
        inside = (self.ids >= start) & (self.ids < stop)
        found = self.columns.new_zeros(b, stop - start, c)
        row, token = inside.nonzero(as_tuple=True)
        at = row * (stop - start) + self.ids[row, token] - start
        found.view(-1, c).index_add_(0, at, self.columns[row, token])
        return found


Term = Product | Picks
TakeFactors = Callable[["Factors"], None]
"""Receives the gradients of one matrix as factors."""


@dataclass(eq=False)
class Factors:
    """Per-sample gradients of one matrix.

    Attributes:
        name: name of the parameter.
        shape: its shape [r, c].
        dtype: its dtype.
        terms: the gradients are the sum of these.

    """

    name: str
    shape: Size
    dtype: torch.dtype
    terms: list[Term] = field(default_factory=list)

    def part(self, start: int, stop: int) -> Float[Tensor, "b some c"]:
        """Compute some rows of the gradients.

        Args:
            start: first row.
            stop: end of the rows, exclusive.

        Returns:
            The dtype of the parameter, [b, stop - start, c].

        """
        total = self.terms[0].part(start, stop).to(self.dtype)
        for term in self.terms[1:]:
            total += term.part(start, stop)
        return total

    def dense(self) -> Float[Tensor, "b r c"]:
        """Compute the whole gradients.

        Returns:
            The dtype of the parameter, [b, r, c].

        """
        return self.part(0, self.shape[0])

    def squared_norms(self) -> Float[Tensor, " b"]:
        """Compute the squared norms of the gradients from inner products of factors, without a gradient.

        Returns:
            float32 [b].

        """
        total = sum(_inner(one, other) for one in self.terms for other in self.terms)
        assert isinstance(total, Tensor)
        return total.clamp_min(0)


def _inner(one: Term, other: Term) -> Tensor:
    """Compute the inner products of two terms, float32 [b]."""
    if isinstance(one, Product) and isinstance(other, Picks):
        one, other = other, one
    if isinstance(one, Product) and isinstance(other, Product):
        rows = one.rows.float() @ other.rows.float().mT
    elif isinstance(one, Picks) and isinstance(other, Picks):
        rows = (one.ids[:, :, None] == other.ids[:, None]).float()
    else:
        assert isinstance(one, Picks) and isinstance(other, Product)
        index = one.ids[:, None].expand(-1, other.rows.shape[1], -1)
        rows = other.rows.float().gather(2, index).mT
    return (rows * (one.columns.float() @ other.columns.float().mT)).sum((1, 2))
