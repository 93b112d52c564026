"""Named tensors as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.order.problem import Params


@dataclass(frozen=True)
class Layout:
    """How named tensors are concatenated to one vector [p], in the order of the names.

    Attributes:
        shapes: name -> shape.

    """

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, params: Params) -> Layout:
        """Create the layout of parameters.

        Args:
            params: name -> [*shape].

        Returns:
            The layout.

        """
        return cls({name: p.shape for name, p in params.items()})

    @property
    def size(self) -> int:
        """p, the length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def vector(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Float[Tensor, " p"]:
        """Concatenate tensors.

        Args:
            tensors: name -> [*shape], floating dtype.
            dtype: dtype of the result; None keeps the dtype.

        Returns:
            A copy, [p].

        """
        return torch.cat([tensors[name].detach().reshape(-1).to(dtype) for name in self.shapes])

    def tensors(self, vector: Float[Tensor, " p"]) -> Params:
        """Split a vector.

        Args:
            vector: floating dtype [p].

        Returns:
            Name -> [*shape], views of the vector.

        """
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), torch.split(vector, sizes), strict=True)
        }
