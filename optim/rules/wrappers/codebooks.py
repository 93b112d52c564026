"""Code books: the number that each code stands for, and the nearest code for a number."""

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

_LOW_BITS = 16  # the bits of a float32 that the first guess of a code ignores


def _dynamic_book(signed: bool) -> Tensor:
    """Return float32 [256], increasing: 0, 1, and seven decades, each with twice as many values as the one below."""
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        decade = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values


def _float8_book(dtype: torch.dtype, signed: bool) -> Tensor:
    """Return float32 [256], increasing: the finite numbers of a float8 dtype divided by the largest; the rest is 1."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = torch.unique(values[values.isfinite() & (signed | (values >= 0))])
    return torch.cat([values / values.max(), torch.ones(256 - len(values))])


_SIGNED_4BIT: tuple[float, ...] = (-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0)
_SIGNED_4BIT += (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0)


class Book:
    """A code book with a fast search for the nearest entry.

    The search uses a table indexed by the upper half of a float32, and one comparison. A number halfway between two
    entries in float32 is rounded to the lower one.

    Args:
        values: The entries, increasing, float32 [256], or [16] for codes of 4 bits.

    Attributes:
        values: The entries.
        first: A code for each upper half of a float32, which is correct or too low by one.
        limits: The number above which that code is too low.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        limits = (values[:-1] + values[1:]) / 2
        upper = torch.arange(1 << _LOW_BITS, dtype=torch.int64) << _LOW_BITS
        upper = torch.where(upper >= 1 << 31, upper + (1 << _LOW_BITS) - 1, upper)  # the lowest such float
        lowest = torch.where(upper >= 1 << 31, upper - (1 << 32), upper).to(torch.int32).view(torch.float32)
        self.first = torch.bucketize(lowest.nan_to_num(nan=0.0), limits).to(torch.int32)
        self.limits = torch.cat([limits, limits.new_tensor([torch.inf])])

    def encode(self, y: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Return the nearest entry of each number.

        Args:
            y: Numbers in [-1, 1], of any shape and a floating-point dtype.

        Returns:
            Codes of the same shape, uint8.
        """
        index = y.float().view(torch.int32).bitwise_right_shift(_LOW_BITS).bitwise_and_((1 << _LOW_BITS) - 1)
        first = take(self.first, index)
        return (first + (y > take(self.limits, first)).int()).to(torch.uint8)

    def encode_stochastic(
        self, y: Float[Tensor, "*shape"], uniform: Float[Tensor, "*shape"]
    ) -> UInt8[Tensor, "*shape"]:
        """Return one of the two neighbours of each number, chosen at random such that the mean is the number.

        Args:
            y: Numbers in [-1, 1], of any shape and a floating-point dtype.
            uniform: Random numbers in [0, 1) of the same shape.

        Returns:
            Codes of the same shape, uint8.
        """
        nearest = self.encode(y).int()
        lower = (nearest - (take(self.values, nearest) > y).int()).clamp(0, len(self.values) - 2)
        below, above = take(self.values, lower), take(self.values, lower + 1)
        return (lower + (uniform * (above - below) < y - below).int()).to(torch.uint8)


def take(table: Shaped[Tensor, " n"], index: Int[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the entries of a table at an index, on the device of the index.

    Args:
        table: Entries of shape [n] and any dtype.
        index: An integer tensor of any shape.

    Returns:
        A tensor of the index's shape and the table's dtype.
    """
    return table.to(index.device).index_select(0, index.reshape(-1)).reshape(index.shape)


BOOKS = {
    ("dynamic", True): Book(_dynamic_book(True)),
    ("dynamic", False): Book(_dynamic_book(False)),
    ("fp8_e4m3", True): Book(_float8_book(torch.float8_e4m3fn, True)),
    ("fp8_e4m3", False): Book(_float8_book(torch.float8_e4m3fn, False)),
    ("fp8_e5m2", True): Book(_float8_book(torch.float8_e5m2, True)),
    ("fp8_e5m2", False): Book(_float8_book(torch.float8_e5m2, False)),
    ("4bit", True): Book(torch.tensor(_SIGNED_4BIT)),
    ("4bit", False): Book(torch.arange(1, 17, dtype=torch.float32) / 16),
}
"""Code books by code, and whether they are signed. Those of 4 bits are from Li et al. 2023, arXiv 2309.01507."""

VALUES = {
    ("linear", True): torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.float32) / 127,
    ("linear", False): torch.arange(256, dtype=torch.float32) / 255,
} | {key: book.values for key, book in BOOKS.items()}
"""The number that each code stands for, float32 [256] or [16], by the code and whether it is signed."""

CODES = ("dynamic", "linear", "fp8_e4m3", "fp8_e5m2", "4bit")


def packed(codes: UInt8[Tensor, " n"]) -> UInt8[Tensor, " half"]:
    """Return codes of 4 bits, two per byte, the first one in the lower bits.

    Args:
        codes: Codes below 16, uint8 [n].

    Returns:
        Bytes, uint8 [n / 2], rounded up.
    """
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpacked(pairs: UInt8[Tensor, " half"], n: int) -> UInt8[Tensor, " n"]:
    """Return the inverse of `packed`.

    Args:
        pairs: Bytes, uint8 [n / 2], rounded up.
        n: The number of codes.

    Returns:
        Codes, uint8 [n].
    """
    return torch.stack([pairs & 15, pairs >> 4], -1).view(-1)[:n]
