"""Dense random signs, made when they are needed and never stored."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from datatools.projectors.base import Projector, bits, key

_TILE_BYTES = 32 << 20  # of signs held at a time
# the eight signs of each octet, lowest bit first: five times faster than shifting every bit out
_OCTETS = 1.0 - 2.0 * ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()


@dataclass(frozen=True)
class Rademacher(Projector):
    """Px = R^T x / sqrt(dim) with R_ij = +1 or -1 by a fair coin: bit j mod 64 of the hash of (i, j div 64).

    Cost: 2 dim multiplications and additions per coordinate, and making the signs. This is LESS's published projection
    (there without the 1 / sqrt(dim), and with a matrix that depends on the device).

    Source:
        Achlioptas 2003; Xia et al. 2024, arXiv 2402.04333.

    """

    name: ClassVar[str] = "rademacher"

    def accumulate(self, out: Tensor, name: str, grad: Tensor) -> None:
        """out [b, dim] += grad [b, *shape] R / sqrt(dim)."""
        flat = grad.reshape(len(grad), -1).float()
        stem = key(self.seed, name, grad.shape[1:])
        tile = max(1, _TILE_BYTES // (4 * self.dim))
        for start in range(0, flat.shape[1], tile):
            stop = min(start + tile, flat.shape[1])
            out.addmm_(flat[:, start:stop], self.signs(stem, start, stop, flat.device), alpha=self.dim**-0.5)

    def signs(self, stem: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows start..stop of R, float32 [stop - start, dim]."""
        words = -(-self.dim // 64)
        rows = torch.arange(start, stop, device=device)[:, None] * words
        z = bits(rows + torch.arange(words, device=device), stem)
        octets = z.view(torch.uint8).flatten()
        if sys.byteorder == "big":
            octets = octets.view(-1, 8).flip(1).flatten()
        return _OCTETS.to(device)[octets.int()].view(stop - start, words * 64)[:, : self.dim]
