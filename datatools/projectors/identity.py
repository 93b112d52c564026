"""No projection: the features are the gradients themselves, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Size, Tensor

from datatools.projectors.base import Projector


@dataclass(frozen=True)
class Identity(Projector):
    """Px = x: every inner product exact, `dim` = number of coordinates. For small adapters and for tests."""

    name: ClassVar[str] = "identity"
    offsets: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, Size], dim: int, seed: int) -> Identity:
        """`dim` and `seed` have no meaning here; the layout is that of `shapes`."""
        offsets, total = [], 0
        for name, shape in shapes.items():
            offsets.append((name, total))
            total += shape.numel()
        return cls(dim=total, seed=0, offsets=tuple(offsets))

    def accumulate(self, out: Tensor, name: str, grad: Tensor) -> None:
        """out[:, offset : offset + n] += grad [b, n]."""
        flat = grad.reshape(len(grad), -1)
        start = dict(self.offsets)[name]
        out[:, start : start + flat.shape[1]] += flat
