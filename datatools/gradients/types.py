"""Types of the arguments and results of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

Batch = Mapping[str, Tensor]
"""Name -> tensor [b, ...] of b rows."""
Loss = Callable[[Any, Batch], Tensor]
"""(module, batch of b rows) -> losses, floating dtype [b]."""
Visit = Callable[[str, Tensor], None]
"""Receives a parameter's name and its per-sample gradients [b, *shape]; the caller does not use the tensor again."""
Method = Literal["hooks", "loop", "vmap"]


def size_of(batch: Batch) -> int:
    """Return the number of rows of a batch.

    Args:
        batch: name -> tensor [b, ...].

    Returns:
        b.

    """
    return len(next(iter(batch.values())))
