"""No projection: features are the concatenated gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float32
from torch import Size, Tensor

from datatools.projectors.base import Projector


@dataclass(frozen=True)
class Identity(Projector):
    """Px = x: every inner product is exact, and `dim` is the number of coordinates. For small adapters and for tests.

    Attributes:
        offsets: (parameter name, index of its first feature) for each parameter.

    Example:
        >>> import torch
        >>> identity = Identity.of({"w": Size((2,)), "b": Size((1,))}, dim=0, seed=0)
        >>> identity.project({"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0]])})
        tensor([[1., 2., 3.]])

    """

    name: ClassVar[str] = "identity"
    offsets: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, Size], dim: int, seed: int) -> Identity:
        """Create the projector for parameters of these shapes.

        Args:
            shapes: name -> shape of each parameter; they determine the dimension.
            dim: ignored.
            seed: ignored.

        Returns:
            The projector.

        """
        offsets, total = [], 0
        for name, shape in shapes.items():
            offsets.append((name, total))
            total += shape.numel()
        return cls(dim=total, seed=0, offsets=tuple(offsets))

    def accumulate(self, out: Float32[Tensor, "b dim"], name: str, grad: Float[Tensor, " b *shape"]) -> None:
        """Add one parameter's gradients to its columns: out[:, offset : offset + p] += grad, flattened to [b, p].

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """
        flat = grad.reshape(len(grad), -1)
        start = dict(self.offsets)[name]
        out[:, start : start + flat.shape[1]] += flat

    def accumulate_part(
        self, out: Float32[Tensor, "b dim"], name: str, shape: Size, start: int, grad: Float[Tensor, "b some *rest"]
    ) -> None:
        """Add some rows of one parameter's gradients to their columns.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            shape: its shape.
            start: number of the first row.
            grad: gradients of these rows, any floating dtype [b, some, *rest].

        """
        flat = grad.reshape(len(grad), -1)
        begin = dict(self.offsets)[name] + start * shape[1:].numel()
        out[:, begin : begin + flat.shape[1]] += flat
