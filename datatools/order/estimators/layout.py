"""Named tensors as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from datatools.order.problem import Params


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one vector [p], in the order of the names."""

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, params: Params) -> Layout:
        """The layout of these parameters."""
        return cls({name: p.shape for name, p in params.items()})

    @property
    def size(self) -> int:
        """p."""
        return sum(shape.numel() for shape in self.shapes.values())

    def vector(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """[p]."""
        return torch.cat([tensors[name].detach().reshape(-1).to(dtype) for name in self.shapes])

    def tensors(self, vector: Tensor) -> Params:
        """name -> [*shape], views of the vector."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), torch.split(vector, sizes), strict=True)
        }
