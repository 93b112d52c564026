"""Code books of 8 bits: the number that each byte stands for, and the nearest byte for a number."""

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

_LOW_BITS = 16  # of a float32, that the first guess of a code does not look at


def _dynamic_book(signed: bool) -> Tensor:
    """float32 [256], increasing: seven decades, each with twice as many values as the one below; 0 and 1."""
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        decade = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values


class Book:
    """A code book with a fast search for the nearest entry: a table indexed by the upper half of a float32, and one
    comparison.

    A number halfway between two entries in float32 goes to the lower one. `first` has a code for each upper half, which
    is correct or one too low; `limits` has the number above which it is too low.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        limits = (values[:-1] + values[1:]) / 2
        upper = torch.arange(1 << _LOW_BITS, dtype=torch.int64) << _LOW_BITS
        upper = torch.where(upper >= 1 << 31, upper + (1 << _LOW_BITS) - 1, upper)  # of negative floats, the lowest
        lowest = torch.where(upper >= 1 << 31, upper - (1 << 32), upper).to(torch.int32).view(torch.float32)
        self.first = torch.bucketize(lowest.nan_to_num(nan=0.0), limits).to(torch.int32)
        self.limits = torch.cat([limits, limits.new_tensor([torch.inf])])

    def encode(self, y: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Return the nearest entry of each number in [-1, 1], as uint8."""
        index = y.float().view(torch.int32).bitwise_right_shift(_LOW_BITS).bitwise_and_((1 << _LOW_BITS) - 1)
        first = take(self.first, index)
        return (first + (y > take(self.limits, first)).int()).to(torch.uint8)

    def encode_stochastic(
        self, y: Float[Tensor, "*shape"], uniform: Float[Tensor, "*shape"]
    ) -> UInt8[Tensor, "*shape"]:
        """Return one of the two neighbours of each number as uint8, at random such that the mean is the number."""
        nearest = self.encode(y).int()
        lower = (nearest - (take(self.values, nearest) > y).int()).clamp(0, 254)
        below, above = take(self.values, lower), take(self.values, lower + 1)
        return (lower + (uniform * (above - below) < y - below).int()).to(torch.uint8)


def take(table: Shaped[Tensor, " n"], index: Int[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the entries of a table [n] at an index of any shape, on the device of the index."""
    return table.to(index.device).index_select(0, index.reshape(-1)).reshape(index.shape)


BOOKS = {True: Book(_dynamic_book(True)), False: Book(_dynamic_book(False))}
"""Whether signed -> the dynamic code book."""

VALUES = {
    ("dynamic", True): BOOKS[True].values,
    ("dynamic", False): BOOKS[False].values,
    ("linear", True): torch.arange(256, dtype=torch.uint8).view(torch.int8).to(torch.float32) / 127,
    ("linear", False): torch.arange(256, dtype=torch.float32) / 255,
}
"""(code, whether signed) -> the number that each byte stands for, float32 [256]."""
