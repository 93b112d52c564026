"""Encodings of unit-length rows for storage: as floats, or quantized to 8, 4 or 1 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Encoding:
    """How a row of unit length is stored.

    Attributes:
        tensor: safetensors' name of the element type.
        element: the numpy type of an element.
        bits: bits per feature.
        levels: 0 for floats, else the largest of the symmetric integer levels.
        encode: float32 [n, dim], unit or zero rows -> (stored elements [n, width], their scales, float32 [n]).
        decode: (stored elements [n, width], dim) -> float32 [n, dim], up to the scale of each row.

    """

    tensor: str
    element: type[np.generic]
    bits: int
    levels: int
    encode: Callable[[Rows], tuple[NDArray[Any], Rows]]
    decode: Callable[[NDArray[Any], int], Tensor]

    def width(self, dim: int) -> int:
        """Compute the number of stored elements per row.

        Args:
            dim: feature dimension.

        Returns:
            Elements of type `element`.

        """
        return -(-dim * self.bits // (8 * np.dtype(self.element).itemsize))


def _ones(unit: Rows) -> Rows:
    return np.ones(len(unit), dtype=np.float32)


def _encode_bfloat16(unit: Rows) -> tuple[NDArray[Any], Rows]:
    return torch.from_numpy(unit).bfloat16().view(torch.int16).numpy().view(np.uint16), _ones(unit)


def _decode_bfloat16(stored: NDArray[Any], dim: int) -> Tensor:
    return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16).float()


def _decode_numbers(stored: NDArray[Any], dim: int) -> Tensor:
    return torch.from_numpy(np.array(stored)).float()  # torch converts float16 several times as fast as numpy


def _quantized(unit: Rows, levels: int) -> tuple[NDArray[np.int8], Rows]:
    largest = np.abs(unit).max(1, initial=0.0)
    # divided first, so that max|x| is exactly 1 whatever the scale of the row
    ratio = unit / np.where(largest > 0, largest, 1)[:, None]
    return np.rint(ratio * np.float32(levels)).astype(np.int8), (largest / np.float32(levels)).astype(np.float32)


def _encode_int4(unit: Rows) -> tuple[NDArray[Any], Rows]:
    q, scale = _quantized(unit, 7)
    n, dim = unit.shape
    codes = np.zeros((n, dim + dim % 2), dtype=np.uint8)
    codes[:, :dim] = q + 8
    return codes[:, ::2] | codes[:, 1::2] << 4, scale


def _encode_int1(unit: Rows) -> tuple[NDArray[Any], Rows]:
    scale = np.abs(unit).mean(1, dtype=np.float32) if unit.shape[1] else np.abs(unit).max(1, initial=0.0)
    return np.packbits(unit >= 0, axis=1, bitorder="little"), scale


def _decode_int4(stored: NDArray[Any], dim: int) -> Tensor:
    codes = np.empty((len(stored), 2 * stored.shape[1]), np.int8)
    codes[:, ::2], codes[:, 1::2] = stored & 15, stored >> 4
    codes -= 8
    return torch.from_numpy(codes[:, :dim]).float()


def _decode_int1(stored: NDArray[Any], dim: int) -> Tensor:
    signs = np.unpackbits(stored, axis=1, count=dim, bitorder="little").view(np.int8)
    signs *= 2
    signs -= 1
    return torch.from_numpy(signs).float()


ENCODINGS: Mapping[str, Encoding] = {
    "float32": Encoding("F32", np.float32, 32, 0, lambda x: (x.astype(np.float32), _ones(x)), _decode_numbers),
    "float16": Encoding("F16", np.float16, 16, 0, lambda x: (x.astype(np.float16), _ones(x)), _decode_numbers),
    "bfloat16": Encoding("BF16", np.uint16, 16, 0, _encode_bfloat16, _decode_bfloat16),
    "int8": Encoding("I8", np.int8, 8, 127, lambda x: _quantized(x, 127), _decode_numbers),
    "int4": Encoding("U8", np.uint8, 4, 7, _encode_int4, _decode_int4),
    "int1": Encoding("U8", np.uint8, 1, 1, _encode_int1, _decode_int1),
}
"""The dtypes of a feature store.

QLESS (arXiv 2502.01703): a row x becomes round(x / max|x| * levels), half to even, in 8 or 4 bits, or its signs.

int4 stores column 2i in the low and column 2i + 1 in the high half of byte i, each plus 8; int1 stores column 8i + b in
bit b of byte i, which is set for x >= 0. `scale` times the integer restores the unit row; it is 0 for rows that are not
"ok". Readers normalize again after decoding, as the paper does before the dot product.
"""


def encode(unit: Rows, dtype: str) -> tuple[NDArray[Any], Rows]:
    """Encode rows.

    Args:
        unit: float32 [n, dim], rows of unit length or zero.
        dtype: a key of `ENCODINGS`.

    Returns:
        The stored elements [n, width], and the scale of each row, float32 [n] (1 for float dtypes).

    Example:
        >>> stored, scale = encode(np.array([[0.6, -0.8]], dtype=np.float32), "int8")
        >>> stored.tolist(), round(float(scale[0]) * 127, 4)
        ([[95, -127]], 0.8)

    """
    return ENCODINGS[dtype].encode(unit)


def decode(stored: NDArray[Any], scale: Rows, dtype: str, dim: int) -> Float32[Tensor, "n dim"]:
    """Decode rows that `encode` encoded.

    Args:
        stored: elements [n, width].
        scale: float32 [n].
        dtype: a key of `ENCODINGS`.
        dim: feature dimension.

    Returns:
        float32 [n, dim], rows of unit length or zero.

    Example:
        >>> decode(np.array([[95, -127]], dtype=np.int8), np.array([0.0063], dtype=np.float32), "int8", dim=2)
        tensor([[ 0.5990, -0.8008]])

    """
    encoding = ENCODINGS[dtype]
    x = encoding.decode(stored, dim)
    if encoding.levels:
        x[torch.from_numpy(scale == 0)] = 0
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.div_(torch.where(length > 0, length, 1.0))


def normalize(x: Rows) -> tuple[Rows, Rows]:
    """Scale rows to unit length; zero rows stay zero.

    Rows are first divided by their largest entry, so that squares neither overflow nor underflow (1e-30 ... 1e30). This
    uses numpy, whose sums do not depend on the number of threads.

    Args:
        x: float32 [n, d].

    Returns:
        The unit rows, float32 [n, d], and their former norms, float32 [n]. The norm of a row with a non-finite entry,
        and a norm beyond the range of float32, is not finite.

    Example:
        >>> rows, norms = normalize(np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32))
        >>> rows.round(3).tolist(), norms.tolist()
        ([[0.6000000238418579, 0.800000011920929], [0.0, 0.0]], [5.0, 0.0])

    """
    with np.errstate(all="ignore"):
        one = np.float32(1)
        largest: Rows = np.abs(x).max(1, initial=np.float32(0))
        scaled = x / np.where(largest > 0, largest, one)[:, None]
        length: Rows = np.sqrt(np.square(scaled).sum(1))
        unit = scaled / np.where(length > 0, length, one)[:, None]
        return unit.astype(np.float32, copy=False), largest * length
