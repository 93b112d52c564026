"""The cache of compiled steps: one for each rule, set of dtypes and structure of shapes."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from optim.cpu_jit.assembly import Assembly, assemble
from optim.cpu_jit.kernel import Kernel
from optim.cpu_jit.pools import Pool, dtype_of, shape_of
from optim.cpu_jit.trace import Node, Trace, Unsupported, trace
from optim.rule import UpdateRule

KERNELS = 256
"""The number of compiled steps that are kept, of about 0.5 MiB each."""

_TRACED_SHAPE = (2, 3)

Places: TypeAlias = int | tuple[torch.Size, ...]
"""The shapes of parameter, gradient and state that code depends on; for elementwise rules, the number of dimensions."""


def places_of(rule: UpdateRule, row: Sequence[Tensor]) -> Places:
    """Return what the code of a step depends on, except for dtypes.

    Args:
        rule: The rule.
        row: The parameter, the gradient and the entries of the state.

    Returns:
        Their shapes, or the number of dimensions for an elementwise rule.
    """
    return row[0].ndim if rule.elementwise else tuple(map(shape_of, row))


def parts_of(rule: UpdateRule, pool: Pool, decayed: bool) -> "Iterator[tuple[Compiled | Unsupported, Pool]]":
    """Yield the pool with its compiled step; it is divided if an elementwise rule depends on the number of dimensions.

    Args:
        rule: The rule.
        pool: The tensors.
        decayed: Whether there is weight decay.

    Yields:
        A compiled step, or the reason why there is none, and the part of the pool that it belongs to.
    """
    row = [column[0] for column in pool.columns]
    dtypes = tuple(map(dtype_of, row))
    if not rule.elementwise:
        yield kernel_of(rule, decayed, pool.names, dtypes, places_of(rule, row)), pool
        return
    dims = list(map(Tensor.dim, pool.columns[0]))
    kernels = {ndim: kernel_of(rule, decayed, pool.names, dtypes, ndim) for ndim in sorted(set(dims))}
    if len(set(kernels.values())) == 1:
        yield kernels[dims[0]], pool
        return
    for ndim, kernel in kernels.items():
        mine = [k for k, n in enumerate(dims) if n == ndim]
        yield kernel, Pool([pool.index[k] for k in mine], pool.names, [[c[k] for k in mine] for c in pool.columns])


_compiling = threading.Lock()
_warned: set[str] = set()


class Compiled(NamedTuple):
    """A compiled step and the numbers that it runs with.

    Args:
        kernel: The compiled step.
        numbers: The numbers.
    """

    kernel: "Kernel"
    numbers: tuple[float, ...]


@lru_cache(maxsize=KERNELS)
def kernel_of(
    rule: UpdateRule, decayed: bool, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], places: Places
) -> Compiled | Unsupported:
    """Return the compiled step for tensors of the given kind.

    Args:
        rule: The rule.
        decayed: Whether there is weight decay.
        names: The entries of the state.
        dtypes: The dtypes of parameter, gradient and the entries of the state.
        places: What `places_of` returned.

    Returns:
        The compiled step, or the reason why there is none.
    """
    with _compiling:
        try:
            assembly, full, numbers = assembled(rule, decayed, names, dtypes, places, _known)
            return Compiled(Kernel.of(assembly, full), tuple(map(float, numbers)))
        except Unsupported as reason:
            return reason.with_traceback(None)  # a traceback would keep the tensors of this call alive
        except Exception as error:  # from this package or LLVM: a step must not fail because it cannot be compiled
            if rule.name not in _warned:
                _warned.add(rule.name)
                warnings.warn(
                    f"{rule.name}: steps are not compiled ({type(error).__name__}: {error}); results are the same, but "
                    "they are slower",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return Unsupported(f"{type(error).__name__}: {error}")


_Full: TypeAlias = tuple[bool, ...] | None
"""Which columns have the parameter's shape, if nothing else is known about their shapes."""

_Known: TypeAlias = dict[tuple[Any, str], tuple[Assembly, _Full]]

_known: _Known = {}
"""(A rule without its numbers, the structure of its step) -> its assembly; at most `KERNELS` entries.

The structure is that of the first of two shapes. If it is equal there, code that was found to be valid for every shape
still is.
"""


def _form(value: Any) -> Any:
    """Return a rule, or a field of one, without the numbers that compiled code reads when it runs."""
    if isinstance(value, UpdateRule):
        return type(value), *((field.name, _form(getattr(value, field.name))) for field in fields(value))
    if isinstance(value, tuple):
        return tuple(map(_form, value))
    return float if isinstance(value, float) else value


def assembled(
    rule: UpdateRule,
    decayed: bool,
    names: tuple[str, ...],
    dtypes: Sequence[torch.dtype],
    places: Places,
    known: _Known | None = None,
) -> "tuple[Assembly, _Full, tuple[float, ...]]":
    """Return the code of a step and its numbers.

    Args:
        rule: The rule.
        decayed: Whether there is weight decay.
        names: The entries of the state.
        dtypes: The dtypes of parameter, gradient and the entries of the state.
        places: What `places_of` returned.
        known: The code of other steps, which is used for steps of the same structure.

    Returns:
        The assembly, which columns have the parameter's shape, and the numbers.

    Raises:
        Unsupported: With the reason, if the step cannot be compiled.
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
            raise Unsupported(f"a state with entries {list(names)}, but {rule.name} creates {list(wanted)}")
        state = {
            k: t.new_empty(t.shape, dtype=d, device="meta")
            for (k, t), d in zip(wanted.items(), dtypes[2:], strict=True)
        }
        full = tuple(t.shape == shape for t in (param, grad, *state.values()))
        return trace(rule, param, grad, state, decayed=decayed), full

    first, full = traced(2)
    key = (_form(rule), first.structure())
    if key not in known:
        second, _ = traced(3)  # two shapes, to check that the code is valid for every shape
        made = assemble(first)
        if made.passes or made.row or made != assemble(second) or first.numbers != second.numbers:
            raise Unsupported(f"{rule.name} is declared elementwise but depends on the shape or on several elements")
        _keep(known, key, (made, full))
    return *known[key], first.numbers


def _keep(known: _Known, key: tuple[Any, str], value: tuple[Assembly, _Full]) -> None:
    while len(known) >= KERNELS:
        del known[next(iter(known))]
    known[key] = value


@lru_cache(maxsize=8)
def finite_kernel(dtype: torch.dtype) -> Kernel:
    """Return a compiled step that changes nothing and only checks if gradients are finite.

    Args:
        dtype: The dtype of the gradients.

    Returns:
        The compiled step.
    """
    grad = Node("input:param", _TRACED_SHAPE, dtype)
    return Kernel.of(assemble(Trace({"param": grad, "grad": grad}, {}), guarded=True), None)
