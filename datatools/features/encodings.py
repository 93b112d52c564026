"""How a row of unit length is stored: as floats, or quantised to 8, 4 or 1 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Encoding:
    """How a row of unit length is stored: `levels` 0 for floats, else the largest of the symmetric integer levels."""

    tensor: str  # safetensors' name of the element type
    element: type[np.generic]
    bits: int
    levels: int

    def width(self, dim: int) -> int:
        """Elements a row."""
        return -(-dim * self.bits // (8 * np.dtype(self.element).itemsize))


ENCODINGS: Mapping[str, Encoding] = {
    "float32": Encoding("F32", np.float32, 32, 0),
    "float16": Encoding("F16", np.float16, 16, 0),
    "bfloat16": Encoding("BF16", np.uint16, 16, 0),
    "int8": Encoding("I8", np.int8, 8, 127),
    "int4": Encoding("U8", np.uint8, 4, 7),
    "int1": Encoding("U8", np.uint8, 1, 1),
}
"""QLESS (arXiv 2502.01703): a row x becomes round(x / max|x| * levels), half to even, in 8 or 4 bits, or its signs.

int4 holds column 2i in the low and 2i + 1 in the high half of byte i, each plus 8; int1 holds column 8i + b in bit b of
byte i, set for x >= 0. `scale` times the integer gives the unit row back; it is 0 for rows that are not "ok". Readers
normalise again after decoding, as the paper does before the dot product.
"""

_NIBBLES = (np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1) - 8).astype(np.float32)  # [256, 2]
_SIGNS = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.float32) * 2 - 1  # [256, 8]


def encode(unit: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Rows [n, dim] of unit length (or zero) -> stored elements [n, width], scale float32 [n] (1 for float dtypes)."""
    encoding = ENCODINGS[dtype]
    n, dim = unit.shape
    if not encoding.levels:
        if dtype == "bfloat16":
            stored = torch.from_numpy(unit).bfloat16().view(torch.int16).numpy().view(np.uint16)
        else:
            stored = unit.astype(encoding.element)
        return stored, np.ones(n, dtype=np.float32)
    largest = np.abs(unit).max(1, initial=0.0)
    if dtype == "int1":
        scale = np.abs(unit).mean(1, dtype=np.float32) if dim else largest
        return np.packbits(unit >= 0, axis=1, bitorder="little"), scale
    # divided first: max|x| then is exactly 1, whatever the row was scaled by before
    ratio = unit / np.where(largest > 0, largest, 1)[:, None]
    q = np.rint(ratio * np.float32(encoding.levels)).astype(np.int8)
    scale = (largest / np.float32(encoding.levels)).astype(np.float32)
    if dtype == "int8":
        return q, scale
    codes = np.zeros((n, 2 * encoding.width(dim)), dtype=np.uint8)
    codes[:, :dim] = q + 8
    return codes[:, ::2] | codes[:, 1::2] << 4, scale


def decode(stored: NDArray[Any], scale: NDArray[np.float32], dtype: str, dim: int) -> Tensor:
    """What `encode` made -> float32 [n, dim], rows of unit length or zero."""
    if dtype == "bfloat16":
        x = torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16).float()
    elif dtype in ("int4", "int1"):
        table = _NIBBLES if dtype == "int4" else _SIGNS
        x = torch.from_numpy(table[stored].reshape(len(stored), -1)[:, :dim].copy())
    else:
        x = torch.from_numpy(stored.astype(np.float32))
    if ENCODINGS[dtype].levels:
        x[torch.from_numpy(scale == 0)] = 0
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.div_(torch.where(length > 0, length, 1.0))


def normalize(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[n, d] -> (rows of unit length, their norms [n]), float32; rows that are zero stay zero, with norm 0.

    Divides by the largest entry first, so that squares neither overflow nor vanish (1e-30 ... 1e30). The norm of a row
    with a non-finite entry, and one beyond float32, is not finite. numpy: its sums do not depend on threads.
    """
    with np.errstate(all="ignore"):
        one = np.float32(1)
        largest: NDArray[np.float32] = np.abs(x).max(1, initial=np.float32(0))
        scaled = x / np.where(largest > 0, largest, one)[:, None]
        length: NDArray[np.float32] = np.sqrt(np.square(scaled).sum(1))
        unit = scaled / np.where(length > 0, length, one)[:, None]
        return unit.astype(np.float32, copy=False), largest * length
