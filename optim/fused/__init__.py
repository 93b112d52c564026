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
import os
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import backend
from optim.fused.assembly import Assembly, assemble
from optim.fused.trace import Unsupported, trace
from optim.rule import State, UpdateRule

CHUNK = 1 << 15
"""Elements that a thread takes at a time; large enough to pay for the call, small enough to share work evenly."""

_TRACED_SHAPE = (2, 3)
"""Of elementwise rules, whose code fits every shape."""

_PLAIN = (Tensor, Parameter)


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
    pools: dict[Any, list[list[Tensor]]] = {}
    compiled = backend.use_fused() and type(rule).step is UpdateRule.step and not torch.compiler.is_compiling()
    for param, grad, state in zip(params, grads, states, strict=True):
        row = _dense([param, grad, *state.values()], rule.elementwise) if compiled else None
        if row is None:
            rule.step(param, grad, state, lr=lr, weight_decay=weight_decay)
        else:
            key = (None if rule.elementwise else param.shape, *state, *[t.dtype for t in row])
            pools.setdefault(key, []).append(row)
    for key, rows in pools.items():
        names = key[1:len(rows[0]) - 1]
        kernel = _kernel(rule, names, rows[0], weight_decay != 0)
        if isinstance(kernel, Kernel):
            kernel.run(rows, float(lr), float(weight_decay))
            continue
        for param, grad, *values in rows:
            rule.step(param, grad, dict(zip(names, values, strict=True)), lr=lr, weight_decay=weight_decay)


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


def _dense(row: list[Tensor], elementwise: bool) -> list[Tensor] | None:
    """Parameter, gradient and state such that flat memory holds equal coordinates at equal places; None if they do not.

    A gradient of another layout is copied.
    """
    contiguous = True
    for t in row:
        if type(t) not in _PLAIN or not t.is_cpu:
            return None
        contiguous = contiguous and t.is_contiguous()
    param, grad = row[0], row[1]
    if grad.is_neg():
        return None
    if contiguous:
        return row
    stride = param.stride()
    if not (torch.ops.aten.is_non_overlapping_and_dense(param) if elementwise else param.is_contiguous()):
        return None
    if any(t.shape == param.shape and t.stride() != stride for t in row[2:]):
        return None
    if grad.stride() != stride:
        row[1] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return row


_kernels: dict[Any, "Kernel | Unsupported"] = {}
_compiling = threading.Lock()


def _kernel(rule: UpdateRule, names: Sequence[str], row: Sequence[Tensor], decayed: bool) -> "Kernel | Unsupported":
    """The compiled step for tensors such as these, or why there is none."""
    shapes = None if rule.elementwise else tuple(tuple(t.shape) for t in row)
    key = (rule, decayed, shapes, *names, *[t.dtype for t in row])
    found = _kernels.get(key)
    if found is None:
        with _compiling:
            found = _kernels[key] = _compiled(rule, names, row, decayed)
    return found


def _compiled(rule: UpdateRule, names: Sequence[str], row: Sequence[Tensor], decayed: bool) -> "Kernel | Unsupported":
    param, grad, *values = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in row)
    state = dict(zip(names, values, strict=True))
    if rule.elementwise:
        param, grad = (t.new_empty(_TRACED_SHAPE) for t in (param, grad))
        wanted = rule.init(param)
        if list(wanted) != list(names):
            return Unsupported(f"a state with entries {list(names)}, in this order; {rule.name} makes {list(wanted)}")
        state = {k: v.new_empty(wanted[k].shape) for k, v in state.items()}
    elif param.numel() == 0:
        return Unsupported("a tensor without elements")
    try:
        return Kernel(assemble(trace(rule, param, grad, state, decayed=decayed)))
    except Unsupported as reason:
        return reason


class Kernel:
    """A compiled step."""

    def __init__(self, assembly: Assembly) -> None:
        import llvmlite.binding as llvm

        _initialised()
        self.assembly = assembly
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True)
        module = llvm.parse_assembly(assembly.text)
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = True
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        self._engine = llvm.create_mcjit_compiler(module, machine)  # owns the code
        self._engine.finalize_object()
        kinds = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5]
        self._run = ctypes.CFUNCTYPE(None, *kinds)(self._engine.get_function_address("run"))

    def run(self, rows: Sequence[Sequence[Tensor]], lr: float, weight_decay: float) -> None:
        """One step of every row: a parameter, its gradient and its state, in the order of the trace."""
        code = self.assembly
        unit = CHUNK if code.row == 0 else max(1, CHUNK // max(code.row, 1))
        plan = _plan(tuple([row[0].numel() // (code.row or 1) for row in rows]), unit)
        table = array("q")
        for head, row in zip(plan.heads, rows, strict=True):
            table.extend((*head, *[t.data_ptr() for t in row]))
        scratch = array("d", bytes(8 * max(1, code.scratch * len(rows))))
        partials = array("d", bytes(8 * max(1, code.partials * plan.chunks)))
        settings = array("d", (lr, weight_decay))
        shared = [_address(a) for a in (table, scratch, partials, settings)]
        self._phase(0, plan.whole, plan.size, shared)
        if plan.cut:
            for stage in range(code.passes + 1):
                self._phase(2 * stage + 1, plan.large, 0, shared)
                self._phase(2 * stage + 2, plan.cut, plan.size, shared)

    def _phase(self, what: int, items: "array[int]", size: int, shared: Sequence[int]) -> None:
        """All of the items, taken one by one by as many threads as torch has."""
        n = len(items) // 4
        if n == 0:
            return
        counter = array("q", (0,))
        arguments = (what, _address(items), n, _address(counter), *shared)
        helpers = min(torch.get_num_threads(), n) - 1 if size > 2 * CHUNK else 0
        running = [_workers(helpers).submit(self._run, *arguments) for _ in range(helpers)]
        self._run(*arguments)
        for future in running:
            future.result()


class _Plan:
    """How tensors of these sizes are cut, in items (tensor, lo, hi, chunk).

    whole: tensors of at most one chunk. cut: the chunks of the others. large: those others, as one item each. heads:
    for every tensor its first chunk and how many it has. size: elements or rows of them all.
    """

    def __init__(self, sizes: tuple[int, ...], unit: int) -> None:
        self.whole, self.cut, self.large = array("q"), array("q"), array("q")
        self.heads: list[tuple[int, int]] = []
        self.chunks, self.size = 0, sum(sizes)
        for t, size in enumerate(sizes):
            count = max(1, -(-size // unit))
            self.heads.append((self.chunks, count))
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


@lru_cache(maxsize=1)
def _initialised() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    key = (os.getpid(), count)
    if key not in _pools:
        _pools.clear()
        _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="optim")
    return _pools[key]
