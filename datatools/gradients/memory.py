"""Batches that fit into memory: the tokens per batch, halved when a pass runs out of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from datatools.errors import EnvironmentProblem


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory did not suffice: that of a GPU, or the main memory.

    torch reports the first as `OutOfMemoryError`, and everything else as a plain `RuntimeError`.

    Args:
        error: the error.

    Returns:
        True if memory did not suffice.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        True
        >>> is_out_of_memory(RuntimeError("the shapes do not match"))
        False

    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


_WORDS = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "out of memory",  # of MPS, and of libraries on CUDA
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass
class TokenBudget:
    """The padded tokens of a batch, which `MicroBatches.each` halves when a batch does not fit into memory.

    One object serves all batches of a pass, so that what did not fit once is not tried again.

    Args:
        tokens: the tokens of a batch, including padding.
        shrunk: called with (old, new) tokens when they are halved.
        advice: how to make a single row fit, for the error.

    Example:
        >>> from datatools import TokenBudget, micro_batches
        >>> budget = TokenBudget(8)
        >>> seen = []
        >>> def work(rows, batch):
        ...     if len(rows) > 1:
        ...         raise MemoryError
        ...     seen.extend(rows)
        >>> micro_batches([4, 3, 4], budget.tokens, len).each(work, budget)
        >>> sorted(seen), budget.tokens
        ([0, 1, 2], 4)

    """

    tokens: int
    shrunk: Callable[[int, int], object] | None = None
    advice: str = "cut it shorter, or use a machine with more memory"

    def halve(self, area: int) -> None:
        """Halve the budget, until a batch that did not fit exceeds it.

        Args:
            area: the padded tokens of that batch.
        """
        before, self.tokens = self.tokens, max(1, self.tokens // 2)
        while self.tokens >= area > 1:
            self.tokens //= 2
        if self.shrunk is not None:
            self.shrunk(before, self.tokens)

    def refuse(self, row: str, tokens: int) -> EnvironmentProblem:
        """Describe a row that does not fit alone.

        Args:
            row: what the row is called.
            tokens: its length.

        Returns:
            The error to raise.
        """
        return EnvironmentProblem(f"{row} ({tokens:,} tokens) does not fit into memory, even alone; {self.advice}")


def release() -> None:
    """Give back what a failed pass still holds, which may be a cycle that only the collector finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
