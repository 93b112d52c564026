"""A compiled step, run on a pool of tensors: how the work is cut, and the numbers that the code reads."""

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
"""Elements that a thread takes at a time; large enough to pay for the call, small enough to share work evenly."""

CACHED = 1 << 20
"""Elements up to which a thread takes a whole tensor if it must be read several times: what caches of 16 MiB hold."""


class Kernel:
    """A compiled step. full: the columns that have the parameter's shape, where only that is known of them."""

    _made: ClassVar["WeakValueDictionary[tuple[Assembly, tuple[bool, ...] | None], Kernel]"] = WeakValueDictionary()

    def __init__(self, assembly: Assembly, full: tuple[bool, ...] | None) -> None:
        self.assembly, self.full = assembly, full
        self._run, self._engine = _machine_code(assembly.text)  # the engine owns the code

    @classmethod
    def of(cls, assembly: Assembly, full: tuple[bool, ...] | None) -> "Kernel":
        """The one kernel of this code: some rules read the same for every shape."""
        kernel = cls._made.get((assembly, full))
        if kernel is None:
            kernel = cls._made[assembly, full] = cls(assembly, full)
        return kernel

    def fits(self, pool: Pool) -> bool:
        """Whether every tensor has as many elements as the code will touch."""
        if self.full is None:  # the shapes are those that were traced
            return True
        sizes, ones = pool.sizes, (1,) * len(pool.index)
        return all(
            tuple(map(Tensor.numel, column)) == (sizes if full else ones)
            for column, full in zip(pool.columns, self.full, strict=True)
        )

    def run(self, pool: Pool, lr: float = 0.0, weight_decay: float = 0.0, numbers: Sequence[float] = ()) -> bytearray:
        """One step of every tensor of the pool. Returns a byte for each: 0 if it was left, its gradient not finite."""
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
            """All of the items, taken one by one by as many threads as torch has."""
            n = len(items) // 4
            counter = array("q", (0,))

            def work(_: Any = (pool, flags, kept)) -> None:  # owns all that it has addresses of, in the table too
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
    """How tensors of these sizes are cut, in items (tensor, lo, hi, chunk).

    whole: tensors up to that size, one chunk each. cut: the chunks of the others, of `unit`. large: those others, as
    one item each. first, count: of every tensor, its first chunk and how many it has. size: of them all, in elements
    or rows.
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
    """The function `run` of a module, and what owns its code."""
    address, engine = compiled(text)
    kinds = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5]
    return ctypes.CFUNCTYPE(None, *kinds)(address("run")), engine
