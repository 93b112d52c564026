"""Steps of many small matrices at once: tensors of one shape are stacked, and `UpdateRule.stepped` runs on the stack.

A product of matrices cannot be compiled to an elementwise loop (`optim.cpu_jit`), and most of the time for stepping one
64 x 64 matrix is the overhead of calls to torch; on a GPU that holds for matrices up to about 700 x 700. `torch.vmap`
makes batched products from the rule's own definition. The results are those of separate steps, up to the rounding of
batched products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.rule import State, UpdateRule
from optim.sharding import is_sharded

LIMIT = 1 << 22
"""The largest number of elements in a stack: 16 MiB in float32, and a step creates about ten temporaries of that size.
Larger tensors are stepped alone."""

CPU_LIMIT = 1 << 16
"""The same limit on a CPU, where stacking matrices larger than about 64 x 64 gains nothing, and stacks that do not fit
into the cache are slower."""


def step(
    rule: UpdateRule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """Step every parameter as `rule.step` does, in stacks of bounded size.

    Args:
        rule: The rule.
        params: The parameters, of any shapes.
        grads: The gradients, of the same shapes.
        states: The states.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    alike: dict[Any, list[int]] = {}
    for i, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        alike.setdefault(_likeness(param, grad, state), []).append(i)
    for index in alike.values():
        one = params[index[0]]
        size = max(1, (min(LIMIT, CPU_LIMIT) if one.is_cpu else LIMIT) // max(one.numel(), 1))
        for start in range(0, len(index), size):
            chosen = index[start : start + size]
            if len(chosen) == 1:
                rule.step(params[chosen[0]], grads[chosen[0]], states[chosen[0]], lr=lr, weight_decay=weight_decay)
            else:
                columns = ([xs[i] for i in chosen] for xs in (params, grads, states))
                _step_stack(rule, *columns, lr=lr, weight_decay=weight_decay or None)  # type: ignore[arg-type]


def _likeness(param: Tensor, grad: Tensor, state: State) -> Any:
    """Return a key that is equal for tensors that may be stacked; it has the step counts, which stay scalars."""
    if is_sharded(param):
        return id(param)
    counts = tuple(float(value) for value in state.values() if _is_count(value))
    return param.shape, param.dtype, grad.dtype, param.device, tuple(state), counts


def _is_count(value: Tensor) -> bool:
    return value.ndim == 0 and value.device.type == "cpu"


def _step_stack(
    rule: UpdateRule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    *,
    lr: float | Tensor,
    weight_decay: float | None,
) -> None:
    state = {k: v if _is_count(v) else torch.stack([s[k] for s in states]) for k, v in states[0].items()}
    dims = {k: None if _is_count(v) else 0 for k, v in states[0].items()}
    new_params, new_state = torch.vmap(
        lambda p, g, s: rule.stepped(p, g, s, lr=lr, weight_decay=weight_decay), in_dims=(0, 0, dims)
    )(torch.stack(params), torch.stack(grads), state)
    for i, (param, own) in enumerate(zip(params, states, strict=True)):
        param.copy_(new_params[i])
        for key, value in new_state.items():
            own[key].copy_(value[i])
