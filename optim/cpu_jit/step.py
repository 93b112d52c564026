"""One step of many parameters, compiled if possible."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optim import backend
from optim.cpu_jit.cache import Compiled, assembled, finite_kernel, parts_of, places_of
from optim.cpu_jit.pools import PLAIN, Pool, dtype_of, pools_of
from optim.cpu_jit.trace import Unsupported
from optim.rule import State, UpdateRule
from optim.sharding import is_sharded


def step(
    rule: UpdateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> list[bool]:
    """Step every parameter with its gradient and state, by compiled code if possible.

    Args:
        rule: The rule.
        params: The parameters, of any shapes.
        grads: Their gradients, of the same shapes.
        states: Their states.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.

    Returns:
        For each parameter, whether it was stepped. Under a rule with ``elementwise = False``, a parameter whose
        gradient is not finite is left unchanged, and so is its state.
    """
    fine = [True] * len(params)
    taken: list[Pool] = []
    rest: Sequence[int] = range(len(params))
    if params and rule.step_is_update and _can_run() and _hashable(rule):
        taken, rest = pools_of(rule, params, grads, states)
    work: list[tuple[Compiled, Pool]] = []  # everything is compiled before any parameter changes
    for pool in taken:
        for compiled_step, part in parts_of(rule, pool, weight_decay != 0):
            if isinstance(compiled_step, Compiled) and compiled_step.kernel.fits(part):
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
    """Return whether all entries of each gradient are finite on all ranks, without the masks of `isfinite`.

    Args:
        grads: The gradients, of any shapes.

    Returns:
        A boolean per gradient.
    """
    fine: list[bool] = [True] * len(grads)
    pools: dict[torch.dtype, list[int]] = {}
    can_run = _can_run()
    for i, grad in enumerate(grads):
        if can_run and type(grad) in PLAIN and grad.is_cpu and grad.is_contiguous() and not grad.is_neg():
            pools.setdefault(grad.dtype, []).append(i)
        elif is_sharded(grad):  # bool() of a DTensor only sees this rank's rows, but all ranks must agree
            fine[i] = int(grad.isfinite().logical_not().sum().full_tensor()) == 0  # type: ignore[attr-defined]
        elif grad.numel():
            fine[i] = math.isfinite(torch.linalg.vector_norm(grad, math.inf))  # it is NaN if an entry is
    for dtype, index in pools.items():
        column = [grads[i] for i in index]
        for i, flag in zip(index, finite_kernel(dtype).run(Pool(index, (), [column, column])), strict=True):
            fine[i] = bool(flag)
    return fine


def supports(rule: UpdateRule, param: Tensor) -> str:
    """Return why steps of a rule on a parameter are not compiled.

    Args:
        rule: The rule.
        param: The parameter, of any shape.

    Returns:
        The reason; empty if steps are compiled.
    """
    if not rule.step_is_update:
        return "the rule has its own step"
    meta = param.detach().to("meta")
    state = rule.init(meta)
    row = [meta, meta, *state.values()]
    try:
        assembled(rule, True, tuple(state), tuple(map(dtype_of, row)), places_of(rule, row))
    except Unsupported as reason:
        return str(reason)
    return ""


def _hashable(rule: UpdateRule) -> bool:
    try:
        hash(rule)
    except TypeError:  # a field is a list, for example
        return False
    return True


def _can_run() -> bool:
    return backend.use_cpu_jit() and not torch.compiler.is_compiling()
