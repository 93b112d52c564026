"""A compiled step that runs on a pool of tensors: how the work is divided, and the numbers that the code reads."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from optim.cpu_jit.assembly import Assembly
from optim.cpu_jit.machine import compiled
from optim.cpu_jit.pools import Pool
from optim.cpu_jit.threads import together

CHUNK = 1 << 15
"""The number of elements that a thread processes at a time. It is large enough to make the overhead of a call small,
and small enough to distribute work evenly."""

CACHED = 1 << 20
"""The largest number of elements for which one thread steps a whole tensor that must be read several times; so many
fit into caches of 16 MiB."""


class Kernel:
    """A compiled step.

    Args:
        assembly: The code.
        full: Which columns have the parameter's shape, if nothing else is known about their shapes; None if the shapes
            are those that were traced.
    """

    _made: ClassVar["WeakValueDictionary[tuple[Assembly, tuple[bool, ...] | None], Kernel]"] = WeakValueDictionary()

    def __init__(self, assembly: Assembly, full: tuple[bool, ...] | None) -> None:
        self.assembly, self.full = assembly, full
        self._run, self._engine = _machine_code(assembly.text)  # the engine owns the code

    @classmethod
    def of(cls, assembly: Assembly, full: tuple[bool, ...] | None) -> "Kernel":
        """Return the only kernel with this code, because some rules have the same code for every shape.

        Args:
            assembly: The code.
            full: Which columns have the parameter's shape, or None.

        Returns:
            The kernel.
        """
        kernel = cls._made.get((assembly, full))
        if kernel is None:
            kernel = cls._made[assembly, full] = cls(assembly, full)
        return kernel

    def fits(self, pool: Pool) -> bool:
        """Return whether every tensor has as many elements as the code will access.

        Args:
            pool: The tensors.

        Returns:
            True if it has.
        """
        if self.full is None:  # the shapes are those that were traced
            return True
        sizes, ones = pool.sizes, (1,) * len(pool.index)
        return all(
            tuple(map(Tensor.numel, column)) == (sizes if full else ones)
            for column, full in zip(pool.columns, self.full, strict=True)
        )

    def run(self, pool: Pool, lr: float = 0.0, weight_decay: float = 0.0, numbers: Sequence[float] = ()) -> bytearray:
        """Step every tensor of the pool.

        Args:
            pool: The tensors.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
            numbers: The numbers that the code reads.

        Returns:
            A byte per tensor: 0 if it was left unchanged because its gradient is not finite, and 1 otherwise.
        """
        code = self.assembly
        rows, count = max(code.row, 1), len(pool.index)
        plan = _plan(
            pool.sizes if code.row == 0 else tuple(n // rows for n in pool.sizes),
            max(1, CHUNK // rows),
            max(1, (CACHED if code.passes else CHUNK) // rows),
        )
        width = 4 + len(pool.columns)
        table = array("q", bytes(8 * width * count))
        flags = bytearray(b"\1") * count
        at = ctypes.addressof(ctypes.c_char.from_buffer(flags)) if count else 0
        table[0::width], table[1::width], table[2::width] = plan.first, plan.count, array("q", range(at, at + count))
        for j, column in enumerate(pool.columns):
            table[j + 4 :: width] = array("q", map(Tensor.data_ptr, column))
        kept = array("d", bytes(8 * code.kept * plan.size))
        if code.kept:
            sizes = (8 * code.kept * n // rows for n in pool.sizes)
            table[3::width] = array("q", accumulate(sizes, initial=_address(kept)))[:-1]
        scratch = array("d", bytes(8 * max(1, code.scratch * count)))
        partials = array("d", bytes(8 * max(1, code.partials * plan.chunks)))
        settings = array("d", (lr, weight_decay, *numbers))
        elements = plan.size * rows

        def phase(what: int, items: "array[int]", elements: int) -> None:
            """Process all items one by one, on as many threads as torch has."""
            n = len(items) // 4
            counter = array("q", (0,))

            def work(_: Any = (pool, flags, kept)) -> None:  # owns everything whose addresses are in the table
                buffers: list[array[Any]] = [counter, table, scratch, partials, settings]
                self._run(what, _address(items), n, *map(_address, buffers))

            if n:
                together(work, min(torch.get_num_threads(), n) - 1 if elements > 2 * CHUNK else 0)

        phase(0, plan.whole, elements)
        if plan.cut:
            for stage in range(code.passes + 1):
                phase(2 * stage + 1, plan.large, 0)
                phase(2 * stage + 2, plan.cut, elements)
        return flags


class _Plan:
    """The division of tensors into items (tensor, lo, hi, chunk).

    Args:
        sizes: The sizes of the tensors, in elements or rows.
        unit: The size of a chunk of a large tensor.
        whole: The largest size of a tensor that is a single chunk.

    Attributes:
        whole: The tensors that are a single chunk, as items.
        cut: The chunks of all other tensors, as items.
        large: All other tensors, as one item each.
        first: The first chunk of every tensor.
        count: The number of chunks of every tensor.
        chunks: The number of all chunks.
        size: The size of all tensors together.
    """

    def __init__(self, sizes: tuple[int, ...], unit: int, whole: int) -> None:
        self.whole, self.cut, self.large = array("q"), array("q"), array("q")
        self.first, self.count = array("q"), array("q")
        self.chunks, self.size = 0, sum(sizes)
        for t, size in enumerate(sizes):
            count = 1 if size <= whole else -(-size // unit)
            self.first.append(self.chunks)
            self.count.append(count)
            if count == 1:
                self.whole.extend((t, 0, size, self.chunks))
            else:
                self.large.extend((t, 0, size, self.chunks))
                for c in range(count):
                    self.cut.extend((t, c * unit, min(size, (c + 1) * unit), self.chunks + c))
            self.chunks += count


@lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], unit: int, whole: int) -> _Plan:
    return _Plan(sizes, unit, whole)


def _address(buffer: "array[Any]") -> int:
    return buffer.buffer_info()[0]


def _machine_code(text: str) -> tuple[Callable[..., None], object]:
    """Return the function `run` of a module, and the object that owns its code."""
    address, engine = compiled(text)
    kinds = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5]
    return ctypes.CFUNCTYPE(None, *kinds)(address("run")), engine
