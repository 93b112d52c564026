"""Blocks of numbers as codes with one scale each, and back."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from optim import cpu_jit
from optim.kernels.philox import random_words
from optim.rules.wrappers.codebooks import BOOKS, VALUES, packed, take, unpacked

NON_NEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var"})
"""Second moments: entries of states that are never negative, whose codes need no sign."""


class Coding(NamedTuple):
    """How a state is stored: x = book[code] a, with a = max |x| of its block.

    Args:
        code, block_size, floor, stochastic, seed: As in `Quantized`.
    """

    code: str
    block_size: int
    floor: bool
    stochastic: bool
    seed: int

    @property
    def per_byte(self) -> int:
        """The number of codes in a byte."""
        return 2 if self.code == "4bit" else 1

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of an entry's codes.

        Args:
            key: The entry of the state.

        Returns:
            int8 for signed linear codes, otherwise uint8.
        """
        return torch.int8 if self.code == "linear" and key not in NON_NEGATIVE else torch.uint8

    def encode(self, key: str, x: Tensor, step: Tensor, *, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of a tensor, or of a part of one.

        Args:
            key: The entry of the state.
            x: The numbers, n in total, of any shape.
            step: The number of steps, which determines random bits.
            start: The position of the first number in the whole tensor.

        Returns:
            Flat codes, [n], or packed ones, [n / 2]; and scales, float32 [blocks].
        """
        n, size = x.numel(), self.block_size
        flat = x.detach().reshape(-1)
        rows = (flat if n % size == 0 else functional.pad(flat, (0, -n % size))).view(-1, size)
        largest = rows.abs().amax(1).to(torch.float32)
        y = rows / torch.where(largest > 0, largest, 1.0).to(x.dtype).unsqueeze(1)
        signed = key not in NON_NEGATIVE
        draws: Tensor | None = None
        if self.stochastic:
            stream = (step.to(torch.int64) << 8) + sum(key.encode()) % 256
            words = random_words(y.numel(), seed=self.seed, stream=stream, start=start, device=x.device)
            draws = (words.to(y.dtype) / 2**32).view(y.shape)
        if self.code == "linear":
            y = y * (127 if signed else 255)
            codes = (y.round() if draws is None else (y + draws).floor()).to(self.dtype(key))
        elif draws is None:
            codes = BOOKS[self.code, signed].encode(y)
        else:
            codes = BOOKS[self.code, signed].encode_stochastic(y, draws)
        if self._floored(key):
            codes = codes.maximum((y > 0).to(torch.uint8))
        codes = codes.view(-1)[:n]
        return codes if self.per_byte == 1 else packed(codes), largest

    def encode_to(self, codes: Tensor, scales: Tensor, key: str, x: Tensor, step: Tensor, *, start: int = 0) -> None:
        """Write the result of `encode`, by compiled code if possible.

        Args:
            codes: Where the codes are written, flat.
            scales: Where the scales are written, float32 [blocks].
            key: The entry of the state.
            x: The numbers, [n].
            step: The number of steps, which determines random bits.
            start: The position of the first number in the whole tensor.
        """
        if x.dtype == torch.float32 and not self.stochastic and cpu_jit.codes.supports(x, codes, scales):
            signed = key not in NON_NEGATIVE
            kind = "dynamic" if self.code != "linear" else "linear" if signed else "linear_unsigned"
            book = BOOKS["dynamic" if self.code == "linear" else self.code, signed]
            found = codes if self.per_byte == 1 else codes.new_empty(len(x))
            cpu_jit.codes.encode(
                x, found, scales, book.first, book.limits, kind=kind, floor=self._floored(key),
                block_size=self.block_size,
            )  # fmt: skip
            if found is not codes:
                codes.copy_(packed(found))
        else:
            new, largest = self.encode(key, x, step, start=start)
            codes.copy_(new)
            scales.copy_(largest)

    def decode(self, key: str, codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int) -> Tensor:
        """Return the numbers that codes stand for.

        Args:
            key: The entry of the state.
            codes: Codes of any shape.
            scales: The scales, float32 [blocks].
            dtype: The dtype of the result.
            n: The number of numbers.

        Returns:
            Numbers, [n].
        """
        size = self.block_size
        book = VALUES[self.code, key not in NON_NEGATIVE]
        flat = codes.reshape(-1) if self.per_byte == 1 else unpacked(codes.reshape(-1), n)
        if dtype == torch.float32 and cpu_jit.codes.supports(flat, scales):
            return cpu_jit.codes.decode(flat, scales, book, size)
        x = take(book, flat.view(torch.uint8).int()).to(dtype)
        rows = (x if n % size == 0 else functional.pad(x, (0, -n % size))).view(-1, size)
        return (rows * scales.to(dtype).unsqueeze(1)).view(-1)[:n]

    def _floored(self, key: str) -> bool:
        return self.floor and key in NON_NEGATIVE and self.code != "4bit"
