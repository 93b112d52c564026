"""What per-example gradients are asked for and given in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

Batch = Mapping[str, Tensor]
"""Tensors whose first dimension is the example."""
Loss = Callable[[Any, Batch], Tensor]
"""(module, batch of b examples) -> losses [b]."""
Visit = Callable[[str, Tensor], None]
"""Receives a parameter's name and its per-example gradients [b, *shape]; the tensor is not used again by the caller."""
Method = Literal["hooks", "loop", "vmap"]


def size_of(batch: Batch) -> int:
    """The number of examples."""
    return len(next(iter(batch.values())))
