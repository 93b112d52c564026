"""Steps on the CPU, compiled from the rules' own definition: `UpdateRule.update`, traced once, as one loop over memory.

A step is bound by memory, and written in tensor operations it moves every parameter a dozen times. Here the operations
of `update` and `decay` are recorded (`trace`), turned into LLVM assembly (`assembly`) and compiled by llvmlite, at the
first step of a rule, in 0.1 s or so; learning rate and weight decay stay variables. All tensors of a param group are
stepped by one call, spread over ``torch.get_num_threads()`` threads; results do not depend on their number.

What cannot be compiled is stepped by `UpdateRule.step`, tensor by tensor: rules with operations that have no element
loop (products of matrices), rules that override `step`, tensors that are not dense or not on the CPU, subclasses such
as DTensor, and everything where llvmlite is missing or with OPTIM_BACKEND=torch in the environment.
"""

import ctypes
import math
import os
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import backend
from optim.fused.assembly import Assembly, assemble
from optim.fused.trace import Node, Trace, Unsupported, trace
from optim.rule import State, UpdateRule

CHUNK = 1 << 15
"""Elements that a thread takes at a time; large enough to pay for the call, small enough to share work evenly."""

_TRACED_SHAPE = (2, 3)
"""Of elementwise rules, whose code fits every shape."""

_PLAIN = {Tensor, Parameter}
_on_cpu, _dtype, _shape = attrgetter("is_cpu"), attrgetter("dtype"), attrgetter("shape")


def step(
    rule: UpdateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """`rule.step` of every parameter with its gradient and state; compiled where that is possible."""
    pools: list[_Pool] = []
    rest: Sequence[int] = range(len(params))
    if params and type(rule).step is UpdateRule.step and _can_run():
        pools, rest = _pools(rule, params, grads, states)
    for pool in pools:
        kernel = _kernel(rule, pool, weight_decay != 0)
        if isinstance(kernel, Kernel) and kernel.fits(pool):
            kernel.run(pool, float(lr), float(weight_decay))
        else:
            rest = [*rest, *pool.index]
    for i in rest:
        rule.step(params[i], grads[i], states[i], lr=lr, weight_decay=weight_decay)


def all_finite(grads: Sequence[Tensor]) -> list[bool]:
    """Of each gradient, whether all its entries are finite; without the masks that `isfinite` makes."""
    fine: list[bool] = [True] * len(grads)
    pools: dict[torch.dtype, list[int]] = {}
    for i, grad in enumerate(grads):
        if _can_run() and type(grad) in _PLAIN and grad.is_cpu and grad.is_contiguous() and not grad.is_neg():
            pools.setdefault(grad.dtype, []).append(i)
        else:
            fine[i] = bool(grad.isfinite().all())
    for dtype, index in pools.items():
        flags = torch.ones(len(index), dtype=torch.bool)
        column = [grads[i] for i in index]
        kernel = _finite_kernel(dtype)
        kernel.run(_Pool(index, ("finite",), [column, column, list(flags.unbind())]), 0.0, 0.0)
        for i, flag in zip(index, flags.tolist(), strict=True):
            fine[i] = flag
    return fine


def supports(rule: UpdateRule, param: Tensor) -> str:
    """Why steps of this rule on such a parameter are not compiled; empty if they are."""
    if type(rule).step is not UpdateRule.step:
        return "the rule has a step of its own"
    meta = param.detach().to("meta")
    try:
        assemble(trace(rule, meta, meta, rule.init(meta), decayed=True))
    except Unsupported as reason:
        return str(reason)
    return ""


def _can_run() -> bool:
    return backend.use_fused() and not torch.compiler.is_compiling()


@dataclass
class _Pool:
    """Tensors that one kernel steps: columns of parameters, gradients and of each entry of the state."""

    index: Sequence[int]
    names: tuple[str, ...]
    columns: Sequence[Sequence[Tensor]]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(Tensor.numel, self.columns[0]))


def _pools(
    rule: UpdateRule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
) -> tuple[list[_Pool], list[int]]:
    """The tensors in pools of equal dtypes (and shapes, unless the rule is elementwise), and those that fit none."""
    names = tuple(states[0])
    if all(map(names.__eq__, map(tuple, states))):
        columns = [params, grads, *([state[name] for state in states] for name in names)]
        if all(_uniform(column, not rule.elementwise) for column in columns) and not any(map(Tensor.is_neg, grads)):
            return [_Pool(range(len(params)), names, columns)], []
    rows: dict[Any, list[tuple[int, list[Tensor]]]] = {}
    rest = []
    for i, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        row = _dense([param, grad, *state.values()], rule.elementwise)
        if row is None:
            rest.append(i)
        else:
            key = (*state, *map(_dtype, row), *([] if rule.elementwise else map(_shape, row)))
            rows.setdefault((tuple(state), key), []).append((i, row))
    return [
        _Pool([i for i, _ in pool], names, [list(column) for column in zip(*(row for _, row in pool), strict=True)])
        for (names, _), pool in rows.items()
    ], rest


def _uniform(column: Sequence[Tensor], shapes: bool) -> bool:
    """Whether these are plain contiguous tensors on the CPU of one dtype (and one shape): many, so without a loop."""
    return (
        set(map(type, column)) <= _PLAIN
        and all(map(_on_cpu, column))
        and all(map(Tensor.is_contiguous, column))
        and len(set(map(_dtype, column))) == 1
        and not (shapes and len(set(map(_shape, column))) > 1)
    )


def _dense(row: list[Tensor], elementwise: bool) -> list[Tensor] | None:
    """Parameter, gradient and state such that flat memory holds equal coordinates at equal places; None if they do not.

    A gradient of another layout is copied.
    """
    if any(type(t) not in _PLAIN or not t.is_cpu or t.layout != torch.strided for t in row) or row[1].is_neg():
        return None
    if all(t.is_contiguous() for t in row):
        return row
    param, grad = row[0], row[1]
    if not (torch.ops.aten.is_non_overlapping_and_dense(param) if elementwise else param.is_contiguous()):
        return None
    if any(t.shape == param.shape and t.stride() != param.stride() for t in row[2:]):
        return None
    if grad.stride() != param.stride():
        row[1] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return row


_kernels: dict[Any, "Kernel | Unsupported"] = {}
_compiling = threading.Lock()


def _kernel(rule: UpdateRule, pool: _Pool, decayed: bool) -> "Kernel | Unsupported":
    """The compiled step for tensors such as these, or why there is none."""
    first = [column[0] for column in pool.columns]
    shapes = () if rule.elementwise else tuple(map(_shape, first))
    key = (rule, decayed, shapes, pool.names, *map(_dtype, first))
    found = _kernels.get(key)
    if found is None:
        with _compiling:
            found = _kernels[key] = _compiled(rule, pool.names, first, decayed)
    return found


def _compiled(rule: UpdateRule, names: Sequence[str], row: Sequence[Tensor], decayed: bool) -> "Kernel | Unsupported":
    param, grad, *values = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in row)
    state = dict(zip(names, values, strict=True))
    if rule.elementwise:
        param, grad = (t.new_empty(_TRACED_SHAPE) for t in (param, grad))
        wanted = rule.init(param)
        if list(wanted) != list(names):
            return Unsupported(f"a state with entries {list(names)}; {rule.name} makes {list(wanted)}")
        state = {k: v.new_empty(wanted[k].shape) for k, v in state.items()}
    elif param.numel() == 0:
        return Unsupported("a tensor without elements")
    try:
        full = [t.shape == param.shape for t in (param, grad, *state.values())] if rule.elementwise else None
        return Kernel(assemble(trace(rule, param, grad, state, decayed=decayed)), full)
    except Unsupported as reason:
        return reason


@lru_cache(maxsize=8)
def _finite_kernel(dtype: torch.dtype) -> "Kernel":
    """Writes to a flag whether the greatest magnitude is finite; of no decay, no parameter, no rule."""
    grad, flag = Node("input:param", _TRACED_SHAPE, dtype), Node("input:state:finite", (), torch.bool)
    size = Node("abs.default", _TRACED_SHAPE, dtype, (grad,))
    largest = Node("amax.default", (), dtype, (size,))
    finite = Node("lt.Scalar", (), torch.bool, (largest, math.inf))
    return Kernel(assemble(Trace({"param": grad, "grad": grad, "state:finite": flag}, {"state:finite": finite})), None)


class Kernel:
    """A compiled step. full: the columns that have the parameter's shape, where only that is known of them."""

    def __init__(self, assembly: Assembly, full: Sequence[bool] | None) -> None:
        self.assembly, self.full = assembly, full
        self._run = _machine_code(assembly.text)[0]

    def fits(self, pool: _Pool) -> bool:
        """Whether every tensor has as many elements as the code will touch."""
        if self.full is None:  # the shapes are those that were traced
            return True
        sizes, ones = pool.sizes, (1,) * len(pool.index)
        return all(tuple(map(Tensor.numel, column)) == (sizes if full else ones)
                   for column, full in zip(pool.columns, self.full, strict=True))

    def run(self, pool: _Pool, lr: float, weight_decay: float) -> None:
        """One step of every tensor of the pool."""
        code = self.assembly
        rows = max(code.row, 1)
        plan = _plan(pool.sizes if code.row == 0 else tuple(n // rows for n in pool.sizes), max(1, CHUNK // rows))
        width = 2 + len(pool.columns)
        table = array("q", bytes(8 * width * len(pool.index)))
        table[0::width], table[1::width] = plan.first, plan.count
        for j, column in enumerate(pool.columns):
            table[j + 2::width] = array("q", map(Tensor.data_ptr, column))
        scratch = array("d", bytes(8 * max(1, code.scratch * len(pool.index))))
        partials = array("d", bytes(8 * max(1, code.partials * plan.chunks)))
        settings = array("d", (lr, weight_decay))
        shared = [_address(a) for a in (table, scratch, partials, settings)]
        elements = plan.size * rows
        self._phase(0, plan.whole, elements, shared)
        if plan.cut:
            for stage in range(code.passes + 1):
                self._phase(2 * stage + 1, plan.large, 0, shared)
                self._phase(2 * stage + 2, plan.cut, elements, shared)

    def _phase(self, what: int, items: "array[int]", elements: int, shared: Sequence[int]) -> None:
        """All of the items, taken one by one by as many threads as torch has."""
        n = len(items) // 4
        if n == 0:
            return
        counter = array("q", (0,))
        arguments = (what, _address(items), n, _address(counter), *shared)
        helpers = min(torch.get_num_threads(), n) - 1 if elements > 2 * CHUNK else 0
        running = [_workers(torch.get_num_threads()).submit(self._run, *arguments) for _ in range(helpers)]
        self._run(*arguments)
        for future in running:
            future.result()


class _Plan:
    """How tensors of these sizes are cut, in items (tensor, lo, hi, chunk).

    whole: tensors of at most one chunk. cut: the chunks of the others. large: those others, as one item each. first,
    count: of every tensor, its first chunk and how many it has. size: of them all, in elements or rows.
    """

    def __init__(self, sizes: tuple[int, ...], unit: int) -> None:
        self.whole, self.cut, self.large = array("q"), array("q"), array("q")
        self.first, self.count = array("q"), array("q")
        self.chunks, self.size = 0, sum(sizes)
        for t, size in enumerate(sizes):
            count = max(1, -(-size // unit))
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
def _plan(sizes: tuple[int, ...], unit: int) -> _Plan:
    return _Plan(sizes, unit)


def _address(buffer: "array[Any]") -> int:
    return buffer.buffer_info()[0]


@cache  # by text, for some rules read the same for every shape
def _machine_code(text: str) -> tuple[Callable[..., None], object]:
    """The function `run` of a module, and what owns its code."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2, jit=True)
    module = llvm.parse_assembly(text)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kinds = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5]
    return ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address("run")), engine


_executors: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    key = (os.getpid(), count)
    if key not in _executors:
        _executors.clear()
        _executors[key] = ThreadPoolExecutor(count, thread_name_prefix="optim")
    return _executors[key]
