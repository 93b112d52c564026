"""Parts of a tensor as flat memory, and tensors without memory, which keep the memory of a wrapped step small."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def flat_part(x: Tensor, where: slice, *, kept: bool = False) -> Iterator[Tensor]:
    """Yield some entries of a tensor, in the order of its dimensions, as a flat tensor.

    It is a view if the tensor is contiguous. Otherwise it is a copy, which is written back afterwards.

    Args:
        x: The tensor, of any shape.
        where: Which entries.
        kept: Whether x remains unchanged, so that a copy is not written back.

    Yields:
        The entries, of shape [n].
    """
    if x.is_contiguous():
        yield x.view(-1)[where]
        return
    if x.ndim == 1:
        part = x[where].contiguous()
        yield part
        if not kept:
            x[where] = part
        return
    width = x[0].numel()
    first, last = where.start // width, (where.stop - 1) // width
    if first == last:
        inside = slice(where.start - first * width, where.stop - first * width)
        with flat_part(x[first], inside, kept=kept) as part:
            yield part
        return
    rows = x[first : last + 1].contiguous()
    yield rows.view(-1)[where.start - first * width : where.stop - first * width]
    if not kept:
        x[first : last + 1] = rows


class WithoutMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which floating-point tensors with at least `limit` entries are created without data (as meta tensors).

    States that will be coded are initialised with zeros, and creating them in full precision first would take four
    times the memory of the coded state.

    Args:
        limit: The smallest number of entries of such tensors.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(argument.name == "device" for argument in func._schema.arguments):
            made = func(*args, **kwargs | {"device": torch.device("meta")})
            if isinstance(made, Tensor) and made.numel() >= self.limit and made.is_floating_point() and made.ndim:
                return made
        return func(*args, **kwargs)
