"""Projection by dense random signs, which are generated when they are needed and never stored."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Size, Tensor

from datatools.projectors.base import Projector, bits, key

_TILE_BYTES = 32 << 20  # bytes of signs in memory at a time
# the eight signs of each byte, lowest bit first: a table is five times faster than shifting out every bit
_OCTETS = 1.0 - 2.0 * ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()


@dataclass(frozen=True)
class Rademacher(Projector):
    """Px = R^T x / sqrt(dim), where R_ij is +1 or -1 with probability 1/2: bit j mod 64 of the hash of (i, j div 64).

    Cost: 2 dim multiplications and additions per coordinate, and generating the signs. This is LESS's published
    projection (there without the factor 1 / sqrt(dim), and with a matrix that depends on the device).

    Source:
        Achlioptas 2003; Xia et al. 2024, arXiv 2402.04333.

    Example:
        >>> projector = Rademacher(dim=64, seed=0)
        >>> projector.project({"w": torch.ones(5, 30, 20)}).shape
        torch.Size([5, 64])

    """

    name: ClassVar[str] = "rademacher"

    def accumulate(self, out: Float32[Tensor, "b dim"], name: str, grad: Float[Tensor, " b *shape"]) -> None:
        """Add the projection of one parameter's gradients: out += grad R / sqrt(dim).

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            grad: its gradients, any floating dtype [b, *shape].

        """
        self._add(out, key(self.seed, name, grad.shape[1:]), 0, grad)

    def accumulate_part(
        self, out: Float32[Tensor, "b dim"], name: str, shape: Size, start: int, grad: Float[Tensor, "b some *rest"]
    ) -> None:
        """Add the projection of some rows of a parameter's gradients.

        Args:
            out: float32 [b, dim], changed in place.
            name: name of the parameter.
            shape: its shape.
            start: number of the first row.
            grad: gradients of these rows, any floating dtype [b, some, *rest].

        """
        self._add(out, key(self.seed, name, shape), start * shape[1:].numel(), grad)

    def _add(self, out: Tensor, stem: int, offset: int, grad: Tensor) -> None:
        flat = grad.reshape(len(grad), -1).float()
        tile = max(1, _TILE_BYTES // (4 * self.dim))
        for start in range(0, flat.shape[1], tile):
            stop = min(start + tile, flat.shape[1])
            signs = self.signs(stem, offset + start, offset + stop, flat.device)
            out.addmm_(flat[:, start:stop], signs, alpha=self.dim**-0.5)

    def signs(self, stem: int, start: int, stop: int, device: torch.device) -> Float32[Tensor, "rows dim"]:
        """Generate rows start..stop of R.

        Args:
            stem: result of `key`.
            start: first row.
            stop: end of the rows, exclusive.
            device: where to generate them.

        Returns:
            float32 [stop - start, dim] of +1 and -1.

        """
        words = -(-self.dim // 64)
        rows = torch.arange(start, stop, device=device)[:, None] * words
        z = bits(rows + torch.arange(words, device=device), stem)
        octets = z.view(torch.uint8).flatten()
        if sys.byteorder == "big":
            octets = octets.view(-1, 8).flip(1).flatten()
        return _OCTETS.to(device)[octets.int()].view(stop - start, words * 64)[:, : self.dim]
