"""The gradient of each example of a batch, for any `nn.Module`.

Three methods give the same numbers. `loop` is the definition: one forward and backward pass for each example. `hooks`
is the fast default: one pass for the whole batch (`hooks.py`), checked against the definition on one row before it is
believed, and completed by `loop` for the parameters that it cannot see. `vmap` is torch.func's, for modules that it
can transform.

All need rows that do not see each other: the loss of row i may depend on row i alone (no batch normalisation). The
module must be in eval mode, or dropout would make the gradient a random number; that is checked.
Source: Goodfellow 2015, arXiv 1510.01799 (per-example gradients from one backward pass).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from datatools.gradients.hooks import visit_by_hooks
from datatools.gradients.rows import Layouts
from datatools.gradients.types import Batch, Loss, Method, Visit, size_of


def per_sample_grads(
    loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], *, method: Method = "hooks"
) -> dict[str, Tensor]:
    """Per-example gradients of `loss` for the parameters `names`: name -> [b, *shape], in the parameter's dtype.

    Cost: `hooks` one forward and about one forward's worth of backward, and as much backward again for layers whose
    tokens are routed or flattened in an order of their own; `loop` b passes with weight gradients. Parameters that
    `hooks` cannot see (`covered` says which it should) go through `loop` as well, and a warning names them once per
    module. The first call for a module and a set of names costs two more passes over one row: they check `hooks`
    against the definition.
    Memory: b gradients; use `visit_per_sample_grads` to hold one layer at a time.
    Raises: ValueError for an unknown parameter, a module in training mode, or a loss that is not one value per row.
    """
    grads: dict[str, Tensor] = {}
    visit_per_sample_grads(loss, module, batch, names, grads.__setitem__, method=method)
    return {name: grads[name] for name in names}


def visit_per_sample_grads(
    loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], visit: Visit, *, method: Method = "hooks"
) -> Tensor:
    """Call `visit(name, grads [b, *shape])` once for each of `names`, layer by layer; the losses [b], detached.

    With `hooks` the last layer comes first and memory holds the per-example gradients of one layer, whatever the model;
    parameters that need `loop` come after all others.
    """
    known = dict(module.named_parameters())
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"per-sample gradients: the module has no parameter {missing[0]!r} ({len(missing)} unknown names)"
        )
    if training := [name for name, child in module.named_modules() if child.training]:
        raise ValueError(
            f"per-sample gradients: {len(training)} modules are in training mode (first: {training[0]!r}); "
            "call module.eval(), dropout would make each gradient a random number"
        )
    with torch.enable_grad(), _frozen(module):
        if method == "hooks":
            return _visit_by_hooks(loss, module, batch, {name: known[name] for name in names}, visit)
        if method == "loop":
            return _visit_by_loop(loss, module, batch, {name: known[name] for name in names}, visit)
        if method == "vmap":
            return _visit_by_vmap(loss, module, batch, {name: known[name] for name in names}, visit)
    raise ValueError(f"per-sample gradients: unknown method {method!r}; choose hooks, loop or vmap")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that no backward pass forms weight gradients nobody reads."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@dataclass
class _Known:
    """What earlier calls have shown about a module."""

    layouts: Layouts = field(default_factory=Layouts)
    checked: set[frozenset[str]] = field(default_factory=set)
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Parameters for which `hooks` did not give the numbers of the definition, and how."""
    announced: set[str] = field(default_factory=set)


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _visit_by_hooks(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit
) -> Tensor:
    known = _KNOWN.setdefault(module, _Known())
    if frozenset(params) not in known.checked:
        _check(loss, module, batch, params, known)
        known.checked.add(frozenset(params))
    fast = [name for name in params if name not in known.elsewhere]
    losses, refused = visit_by_hooks(loss, module, batch, fast, visit, known.layouts)
    slow = {name: why for name, why in {**known.elsewhere, **refused}.items() if name in params}
    if slow:
        _announce(slow, len(params), known)
        _visit_by_loop(loss, module, batch, {name: params[name] for name in params if name in slow}, visit)
    return losses


def _check(loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], known: _Known) -> None:
    """Compare `hooks` with the definition on the last row of the batch; what differs is left to `loop` from now on."""
    row = {key: tensor[-1:] for key, tensor in batch.items()}
    found: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    visit_by_hooks(loss, module, row, list(params), found.__setitem__, known.layouts)
    if not found:
        return
    _visit_by_loop(loss, module, row, {name: params[name] for name in found}, wanted.__setitem__)
    norms = {name: float(grad.double().norm()) for name, grad in wanted.items()}
    precision = max(torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point())
    precision = max(precision, torch.finfo(torch.float32).eps)  # which parts of a float64 model may still compute in
    for name, grad in found.items():
        off = float((grad.double() - wanted[name].double()).norm())
        limit = _TOLERANCE * precision**0.5 * norms[name] + 4 * precision * max(norms.values())
        if off > limit:  # a row that is not finite proves nothing
            known.elsewhere[name] = "one backward pass for the batch does not give its gradient"


_TOLERANCE = (
    3.0  # times the root of the precision: 0.001 in float32 and float64, 0.26 in bfloat16; a real error is of order 1
)


def _announce(slow: Mapping[str, str], among: int, known: _Known) -> None:
    new = {name: why for name, why in slow.items() if name not in known.announced}
    if new:
        name, why = next(iter(new.items()))
        more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
        known.announced |= set(new)
        warnings.warn(
            f"per-sample gradients: {name}{more} of {among} parameters: {why}; method 'loop' gives them, one pass per "
            "row. Leave them out (`covered`) to go faster",
            stacklevel=6,
        )


def _visit_by_loop(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit
) -> Tensor:
    for p in params.values():
        p.requires_grad_(True)
    try:
        grads: dict[str, list[Tensor]] = {name: [] for name in params}
        losses = []
        for i in range(size_of(batch)):
            value = loss(module, {key: tensor[i : i + 1] for key, tensor in batch.items()}).sum()
            used = value.requires_grad  # not if the loss uses none of them
            found = (
                torch.autograd.grad(value, list(params.values()), allow_unused=True) if used else [None] * len(params)
            )
            for (name, p), grad in zip(params.items(), found, strict=True):
                grads[name].append(torch.zeros_like(p) if grad is None else grad)
            losses.append(value.detach())
    finally:
        for p in params.values():
            p.requires_grad_(False)
    for name in params:
        visit(name, torch.stack(grads.pop(name)))
    return torch.stack(losses)


class _Bound(nn.Module):
    """The loss as a module, so that `functional_call` can swap its parameters."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, row: Batch) -> Tensor:
        return self.loss(self.module, {key: tensor[None] for key, tensor in row.items()}).sum()


def _visit_by_vmap(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit
) -> Tensor:
    bound = _Bound(module, loss)

    def one(p: dict[str, Tensor], row: Batch) -> tuple[Tensor, Tensor]:
        value: Tensor = torch.func.functional_call(
            bound, {f"module.{name}": tensor for name, tensor in p.items()}, (row,)
        )
        return value, value.detach()

    detached = {name: p.detach() for name, p in params.items()}
    with warnings.catch_warnings():  # torch loops over what it cannot batch, and says so each time
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads, losses = torch.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0))(detached, dict(batch))
    for name in params:
        visit(name, grads.pop(name))
    return losses  # type: ignore[no-any-return]
