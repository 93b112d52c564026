"""Steps on the CPU, compiled from the rules' own definition: `UpdateRule.update`, traced once, as one loop over memory.

A step is bound by memory, and written in tensor operations it moves every parameter a dozen times. Here the operations
of `update` and `decay` are recorded (`trace`), turned into LLVM assembly (`assembly`) and compiled by llvmlite, at the
first step of a rule, in 0.1 s or so. Learning rate, weight decay and the numbers that the rule computes with stay
variables: a scheduled momentum is traced again at each change, in some milliseconds, and not compiled again. All
tensors of a param group are stepped by one call, spread over ``torch.get_num_threads()`` threads; results do not depend
on their number.

Tensors that a rule must read several times are stepped whole by one thread while they fit into a cache. The check that
gradients are finite, which rules with ``elementwise = False`` need, is made in the first of these readings; and what
stands in a branch of ``torch.where`` is not read where its scalar condition chooses the other one.

What cannot be compiled is stepped by `UpdateRule.step`, tensor by tensor: rules with operations that have no element
loop (products of matrices), rules called elementwise that look at the shape, rules that override `step` or have a
field that cannot be hashed, tensors that are not dense or not on the CPU, subclasses such as DTensor, and everything
where llvmlite is missing or with OPTIM_BACKEND=torch in the environment. A rule that fails to compile for another
reason is too, with one warning.
"""

import ctypes
import math
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import backend
from optim.fused import codes as codes
from optim.fused.assembly import Assembly, assemble
from optim.fused.machine import compiled
from optim.fused.threads import together
from optim.fused.trace import Node, Trace, Unsupported, trace
from optim.rule import State, UpdateRule
from optim.sharding import is_sharded

CHUNK = 1 << 15
"""Elements that a thread takes at a time; large enough to pay for the call, small enough to share work evenly."""

CACHED = 1 << 20
"""Elements up to which a thread takes a whole tensor if it must be read several times: what caches of 16 MiB hold."""

KERNELS = 256
"""Compiled steps that are kept, of about 0.5 MiB each."""

_TRACED_SHAPE = (2, 3)

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
) -> list[bool]:
    """`rule.step` of every parameter with its gradient and state; compiled where that is possible.

    Returns, for each, whether it was stepped: under a rule with ``elementwise = False`` a parameter whose gradient is
    not finite is left as it is, as is its state.
    """
    fine = [True] * len(params)
    pools: list[_Pool] = []
    rest: Sequence[int] = range(len(params))
    if params and rule.step_is_update and _can_run() and _hashable(rule):
        pools, rest = _pools(rule, params, grads, states)
    work: list[tuple[_Compiled, _Pool]] = []  # all is compiled before anything moves
    for pool in pools:
        for compiled_step, part in _parts(rule, pool, weight_decay != 0):
            if isinstance(compiled_step, _Compiled) and compiled_step.kernel.fits(part):
                work.append((compiled_step, part))
            else:
                rest = [*rest, *part.index]
    for (kernel, numbers), part in work:
        for j, column in enumerate(part.columns):
            if j != 1:  # autograd must see that these tensors change; the gradients do not
                torch.autograd.graph.increment_version(column)
        flags = kernel.run(part, float(lr), float(weight_decay), numbers)
        if 0 in flags:
            for i, flag in zip(part.index, flags, strict=True):
                fine[i] = bool(flag)
    if rest and not rule.elementwise:
        for i, flag in zip(rest, all_finite([grads[i] for i in rest]), strict=True):
            fine[i] = flag
    left = [i for i in rest if fine[i]]
    if left:
        rows = ([column[i] for i in left] for column in (params, grads, states))
        rule.step_all(*rows, lr=lr, weight_decay=weight_decay)  # type: ignore[arg-type]
    return fine


def all_finite(grads: Sequence[Tensor]) -> list[bool]:
    """Of each gradient, whether all its entries are finite, on all ranks; without the masks that `isfinite` makes."""
    fine: list[bool] = [True] * len(grads)
    pools: dict[torch.dtype, list[int]] = {}
    can_run = _can_run()
    for i, grad in enumerate(grads):
        if can_run and type(grad) in _PLAIN and grad.is_cpu and grad.is_contiguous() and not grad.is_neg():
            pools.setdefault(grad.dtype, []).append(i)
        elif is_sharded(grad):  # of a DTensor bool() is the answer of this rank's rows; all ranks must do the same
            fine[i] = int(grad.isfinite().logical_not().sum().full_tensor()) == 0  # type: ignore[attr-defined]
        elif grad.numel():
            fine[i] = math.isfinite(torch.linalg.vector_norm(grad, math.inf))  # a largest magnitude: NaN if one is
    for dtype, index in pools.items():
        column = [grads[i] for i in index]
        for i, flag in zip(index, _finite_kernel(dtype).run(_Pool(index, (), [column, column])), strict=True):
            fine[i] = bool(flag)
    return fine


def supports(rule: UpdateRule, param: Tensor) -> str:
    """Why steps of this rule on such a parameter are not compiled; empty if they are."""
    if not rule.step_is_update:
        return "the rule has a step of its own"
    meta = param.detach().to("meta")
    state = rule.init(meta)
    row = [meta, meta, *state.values()]
    try:
        _assembly(rule, True, tuple(state), tuple(map(_dtype, row)), _places(rule, row))
    except Unsupported as reason:
        return str(reason)
    return ""


def _hashable(rule: UpdateRule) -> bool:
    try:
        hash(rule)
    except TypeError:  # a field of somebody's rule is a list
        return False
    return True


def _can_run() -> bool:
    return backend.use_fused() and not torch.compiler.is_compiling()


@dataclass
class _Pool:
    """Tensors that one kernel steps: columns of parameters, gradients and of each entry of the state."""

    index: Sequence[int]
    names: tuple[str, ...]
    columns: Sequence[Sequence[Tensor]]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(Tensor.numel, self.columns[0]))


def _pools(
    rule: UpdateRule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State]
) -> tuple[list[_Pool], list[int]]:
    """The tensors in pools of equal dtypes (and shapes, unless the rule is elementwise), and those that fit none."""
    names = tuple(states[0])
    if all(map(names.__eq__, map(tuple, states))):
        columns = [params, grads, *([state[name] for state in states] for name in names)]
        alike = rule.elementwise or len(set(map(_shape, params))) < 2  # a gradient has its parameter's shape
        if alike and all(_uniform(c, not rule.elementwise) for c in columns) and not any(map(Tensor.is_neg, grads)):
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


def _uniform(column: Sequence[Tensor], sizes: bool) -> bool:
    """Whether these are plain contiguous tensors on the CPU of one dtype (and one size): many, so without a loop."""
    return (
        set(map(type, column)) <= _PLAIN
        and all(map(_on_cpu, column))
        and all(map(Tensor.is_contiguous, column))
        and len(set(map(_dtype, column))) == 1
        and not (sizes and len(set(map(Tensor.numel, column))) > 1)
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
    if any(t.stride() != param.stride() if t.shape == param.shape else not t.is_contiguous() for t in row[2:]):
        return None
    if grad.stride() != param.stride():
        row[1] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return row


_Places: TypeAlias = int | tuple[torch.Size, ...]
"""What code depends on: the shapes of parameter, gradient and state; for elementwise rules the dimensions' number."""


def _places(rule: UpdateRule, row: Sequence[Tensor]) -> _Places:
    return row[0].ndim if rule.elementwise else tuple(map(_shape, row))


def _parts(rule: UpdateRule, pool: _Pool, decayed: bool) -> "Iterator[tuple[_Compiled | Unsupported, _Pool]]":
    """The pool with its compiled step; in parts where an elementwise rule looks at the number of dimensions."""
    row = [column[0] for column in pool.columns]
    dtypes = tuple(map(_dtype, row))
    if not rule.elementwise:
        yield _kernel(rule, decayed, pool.names, dtypes, _places(rule, row)), pool
        return
    dims = list(map(Tensor.dim, pool.columns[0]))
    kernels = {ndim: _kernel(rule, decayed, pool.names, dtypes, ndim) for ndim in sorted(set(dims))}
    if len(set(kernels.values())) == 1:
        yield kernels[dims[0]], pool
        return
    for ndim, kernel in kernels.items():
        mine = [k for k, n in enumerate(dims) if n == ndim]
        yield kernel, _Pool([pool.index[k] for k in mine], pool.names, [[c[k] for k in mine] for c in pool.columns])


_compiling = threading.Lock()
_warned: set[str] = set()


class _Compiled(NamedTuple):
    """A compiled step and the numbers that it runs with."""

    kernel: "Kernel"
    numbers: tuple[float, ...]


@lru_cache(maxsize=KERNELS)
def _kernel(
    rule: UpdateRule, decayed: bool, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], places: _Places
) -> _Compiled | Unsupported:
    """The compiled step for tensors such as these, or why there is none."""
    with _compiling:
        try:
            assembly, full, numbers = _assembly(rule, decayed, names, dtypes, places, _assembled)
            return _Compiled(Kernel.of(assembly, full), tuple(map(float, numbers)))
        except Unsupported as reason:
            return reason.with_traceback(None)  # which would keep the tensors of this call
        except Exception as error:  # of ours or of LLVM: a step must not fail because it could not be made fast
            if rule.name not in _warned:
                _warned.add(rule.name)
                warnings.warn(
                    f"{rule.name}: its steps are not compiled ({type(error).__name__}: {error})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return Unsupported(f"{type(error).__name__}: {error}")


_Full: TypeAlias = tuple[bool, ...] | None
"""Which columns have the parameter's shape, where only that is known of them."""

_Assembled: TypeAlias = dict[tuple[Any, str], tuple[Assembly, _Full]]

_assembled: _Assembled = {}
"""Rule but for its numbers, structure of its step -> what was made of it; at most `KERNELS`.

The structure is that of the first of two shapes: equal there, code that was once seen to fit every shape still does.
"""


def _form(value: Any) -> Any:
    """What of a rule, or of a field of one, is not a number that compiled code reads when it runs."""
    if isinstance(value, UpdateRule):
        return type(value), *((field.name, _form(getattr(value, field.name))) for field in fields(value))
    if isinstance(value, tuple):
        return tuple(map(_form, value))
    return float if isinstance(value, float) else value


def _assembly(
    rule: UpdateRule,
    decayed: bool,
    names: tuple[str, ...],
    dtypes: Sequence[torch.dtype],
    places: _Places,
    known: _Assembled | None = None,
) -> "tuple[Assembly, _Full, tuple[float, ...]]":
    """The code of a step and its numbers; what was made of another step of the same structure is in `known`.

    Raises: Unsupported, with the reason.
    """
    known = {} if known is None else known
    if not isinstance(places, int):
        param, grad, *values = (torch.empty(t, dtype=d, device="meta") for t, d in zip(places, dtypes, strict=True))
        if param.numel() == 0:
            raise Unsupported("a tensor without elements")
        found = trace(rule, param, grad, dict(zip(names, values, strict=True)), decayed=decayed)
        key = (_form(rule), found.structure())
        if key not in known:
            _keep(known, key, (assemble(found, guarded=True), None))
        return *known[key], found.numbers

    def traced(least: int) -> tuple[Trace, tuple[bool, ...]]:
        shape = tuple(range(least, least + places))
        param, grad = (torch.empty(shape, dtype=d, device="meta") for d in dtypes[:2])
        wanted = rule.init(param)
        if tuple(wanted) != names:
            raise Unsupported(f"a state with entries {list(names)}; {rule.name} makes {list(wanted)}")
        state = {
            k: t.new_empty(t.shape, dtype=d, device="meta")
            for (k, t), d in zip(wanted.items(), dtypes[2:], strict=True)
        }
        full = tuple(t.shape == shape for t in (param, grad, *state.values()))
        return trace(rule, param, grad, state, decayed=decayed), full

    first, full = traced(2)
    key = (_form(rule), first.structure())
    if key not in known:
        second, _ = traced(3)  # two shapes, to see that the code fits every one
        made = assemble(first)
        if made.passes or made.row or made != assemble(second) or first.numbers != second.numbers:
            raise Unsupported(f"{rule.name} is called elementwise and looks at the shape, or at several elements")
        _keep(known, key, (made, full))
    return *known[key], first.numbers


def _keep(known: _Assembled, key: tuple[Any, str], value: tuple[Assembly, _Full]) -> None:
    while len(known) >= KERNELS:
        del known[next(iter(known))]
    known[key] = value


@lru_cache(maxsize=8)
def _finite_kernel(dtype: torch.dtype) -> "Kernel":
    """A step of nothing: only whether gradients are finite."""
    grad = Node("input:param", _TRACED_SHAPE, dtype)
    return Kernel.of(assemble(Trace({"param": grad, "grad": grad}, {}), guarded=True), None)


class Kernel:
    """A compiled step. full: the columns that have the parameter's shape, where only that is known of them."""

    _made: "WeakValueDictionary[tuple[Assembly, tuple[bool, ...] | None], Kernel]" = WeakValueDictionary()

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

    def fits(self, pool: _Pool) -> bool:
        """Whether every tensor has as many elements as the code will touch."""
        if self.full is None:  # the shapes are those that were traced
            return True
        sizes, ones = pool.sizes, (1,) * len(pool.index)
        return all(
            tuple(map(Tensor.numel, column)) == (sizes if full else ones)
            for column, full in zip(pool.columns, self.full, strict=True)
        )

    def run(self, pool: _Pool, lr: float = 0.0, weight_decay: float = 0.0, numbers: Sequence[float] = ()) -> bytearray:
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
