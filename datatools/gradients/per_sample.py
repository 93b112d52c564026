"""The gradient of each row of a batch, for any `nn.Module`.

Three methods give the same results. `loop` is the definition: one forward and backward pass per row. `hooks` is the
fast default: one pass for the whole batch (`hooks.py`), verified against the definition on one row before it is
trusted, and completed by `loop` for the parameters that it cannot cover. `vmap` uses torch.func, for modules that it
can transform.

All methods need independent rows: the loss of row i may depend only on row i. Batch normalization by the statistics of
the batch is refused, and so is a loss that differs between a row alone and the same row in a batch, or between two
passes (`checks.py`). The module must be in eval mode, because dropout would make gradients random; this is checked.
Source: Goodfellow 2015, arXiv 1510.01799 (per-sample gradients from one backward pass).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datatools.gradients.checks import (
    TOLERANCE,
    Precision,
    buffer_versions,
    check_loss_is_repeatable,
    check_modules,
    check_passes_are_equal,
    check_rows_are_independent,
    first_line,
    gradients_of,
    hidden_parameters,
    is_of_checkpointing,
    precision_of,
)
from datatools.gradients.factors import TakeFactors
from datatools.gradients.hooks import visit_by_hooks
from datatools.gradients.rows import Layouts
from datatools.gradients.types import Batch, Loss, Method, Visit, size_of
from optim import curvature


def per_sample_grads(
    loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], *, method: Method = "hooks"
) -> dict[str, Tensor]:
    """Compute the gradient of each row's loss for the parameters `names`.

    Cost: `hooks` takes one forward pass and about the cost of a forward pass for backward, and as much backward again
    for layers whose tokens are routed or flattened in an order of their own; `loop` takes b passes with weight
    gradients. `hooks` computes linear layers, convolutions and their transposes, embeddings, norms, biases, elementwise
    factors, experts, adapters and tensors derived from parameters in that one pass, and repeats any other operation row
    by row. Parameters whose operation has no rows that it can find use `loop`, and a warning names them once per
    module. The first call for a module, a loss and a set of names takes three more passes over one row and a
    forward pass over the batch, which verify `hooks` against the definition and that rows are independent; the next
    few batches are compared too if the loss of the row is near zero, which shows nothing. Memory: b gradients; use
    `visit_per_sample_grads` to hold one layer at a time.

    Args:
        loss: (module, batch) -> losses, floating dtype [b].
        module: the model, in eval mode.
        batch: name -> tensor [b, ...].
        names: names of parameters.
        method: "hooks", "loop" or "vmap".

    Returns:
        Name -> gradients [b, *shape], in the dtype of the parameter.

    Raises:
        ValueError: if a parameter is unknown, the module is in training mode, the loss is not one value per row, or
            depends on other rows or on earlier passes.

    Example:
        >>> module = nn.Linear(2, 1, bias=False).eval()
        >>> batch = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> per_sample_grads(lambda module, batch: module(batch["x"])[:, 0], module, batch, ["weight"])["weight"]
        tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 4.]]])

    """
    grads: dict[str, Tensor] = {}
    visit_per_sample_grads(loss, module, batch, names, grads.__setitem__, method=method)
    return {name: grads[name] for name in names}


def visit_per_sample_grads(
    loss: Loss, module: nn.Module, batch: Batch, names: Sequence[str], visit: Visit, *, method: Method = "hooks",
    take: TakeFactors | None = None, above: int = 0,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Call `visit(name, gradients [b, *shape])` once for each parameter in `names`, layer by layer.

    With `hooks`, the last layer comes first and only the per-sample gradients of one layer are in memory; parameters
    that need `loop` come after all others. With `take`, large gradients of linear layers and embeddings are given as
    their factors, and are never in memory as a whole.

    Args:
        loss: (module, batch) -> losses, floating dtype [b].
        module: the model, in eval mode.
        batch: name -> tensor [b, ...].
        names: names of parameters.
        visit: receives a name and its gradients, in the dtype of the parameter.
        method: "hooks", "loop" or "vmap".
        take: receives gradients of matrices as factors instead of `visit`, where method "hooks" has them.
        above: bytes of the per-sample gradients of a matrix above which `take` receives them; with 0, also only if the
            factors are smaller than the gradients.

    Returns:
        The losses [b], detached.

    Raises:
        ValueError: if a parameter or the method is unknown, the module is in training mode, or the loss is not one
            value per row.

    Example:
        >>> module = nn.Linear(2, 1).eval()
        >>> shapes = {}
        >>> losses = visit_per_sample_grads(
        ...     lambda module, batch: module(batch["x"])[:, 0],
        ...     module,
        ...     {"x": torch.ones(3, 2)},
        ...     ["weight", "bias"],
        ...     lambda name, grads: shapes.update({name: tuple(grads.shape)}),
        ... )
        >>> shapes["weight"], shapes["bias"], losses.shape
        ((3, 1, 2), (3, 1), torch.Size([3]))

    """
    params = dict(module.named_parameters())
    if missing := [name for name in names if name not in params]:
        raise ValueError(
            f"per-sample gradients: the module has no parameter {missing[0]!r} ({len(missing)} unknown names)"
        )
    check_modules(module)
    if training := [name for name, child in module.named_modules() if child.training]:
        raise ValueError(
            f"per-sample gradients: {len(training)} modules are in training mode (first: {training[0]!r}); "
            "call module.eval(), because dropout would make gradients random"
        )
    with torch.enable_grad(), _frozen(module):
        if method == "hooks":
            return _visit_by_hooks(loss, module, batch, {name: params[name] for name in names}, visit, take, above)
        if method == "loop":
            known = _known(loss, module)
            if not known.repeatable:
                with _trained(params[name] for name in names):
                    check_passes_are_equal(loss, module, batch)
                known.repeatable = True
            return _visit_by_loop(loss, module, batch, {name: params[name] for name in names}, visit)
        if method == "vmap":
            return _visit_by_vmap(loss, module, batch, {name: params[name] for name in names}, visit)
    raise ValueError(f"per-sample gradients: unknown method {method!r}; choose hooks, loop or vmap")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of all parameters to False inside, so that no unneeded weight gradients are computed."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@contextmanager
def _trained(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Set `requires_grad` of these parameters inside `_frozen`; some modules put hooks on tensors in every pass."""
    asked = [p for p in params if not p.requires_grad]
    for p in asked:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(False)


_COMPARISONS = 8


@dataclass
class _Known:
    """What earlier calls have determined about a module under one loss."""

    layouts: Layouts = field(default_factory=Layouts)
    checked: set[frozenset[str]] = field(default_factory=set)
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Parameters for which `hooks` did not agree with the definition, with the reason."""
    comparisons: int = _COMPARISONS
    """How many more batches are compared with a row alone; 0 once one has shown that rows are independent."""
    repeatable: bool = False
    """Whether two passes over a row were found to have the same loss, for method `loop`."""
    precision: float = 0.0
    """The spacing of numbers near 1 in which the module computes."""


_ANNOUNCED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
_KNOWN: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, dict[Any, _Known]]] = WeakKeyDictionary()


def _known(loss: Loss, module: nn.Module) -> _Known:
    """Return what is known; another loss may use the module in another way, such as with time in front of rows."""
    owner = getattr(loss, "__self__", loss)  # a bound method is a new object each time
    try:
        by_function = _KNOWN.setdefault(module, WeakKeyDictionary()).setdefault(owner, {})
    except TypeError:  # it has no hash or no weak references
        return _Known()
    return by_function.setdefault(getattr(loss, "__func__", None), _Known())


def _visit_by_hooks(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit,
    take: TakeFactors | None, above: int,
) -> Tensor:  # fmt: skip
    known = _known(loss, module)
    if frozenset(params) not in known.checked:
        known.elsewhere |= dict.fromkeys(hidden_parameters(module) & set(params), "its module is a TorchScript module")
        _check(loss, module, batch, params, known)
        known.checked.add(frozenset(params))
    if known.comparisons and size_of(batch) > 1:
        with _trained(params.values()):
            shown = check_rows_are_independent(loss, module, batch, known.precision or precision_of(module))
        known.comparisons = 0 if shown else known.comparisons - 1
    fast = [name for name in params if name not in known.elsewhere]
    visited: list[str] = []

    def noted(name: str, grads: Tensor) -> None:
        visited.append(name)
        visit(name, grads)

    try:
        losses, refused = visit_by_hooks(loss, module, batch, fast, noted, known.layouts, take, above)
    except (RuntimeError, AssertionError) as error:  # torch.compile may fail on some shapes only
        if visited or not fast or isinstance(error, torch.OutOfMemoryError):
            raise
        refused = dict.fromkeys(fast, f"one pass for the whole batch fails ({first_line(error)})")
        losses = torch.empty(0)
    slow = {name: why for name, why in {**known.elsewhere, **refused}.items() if name in params}
    if slow:
        _announce(slow, len(params), _ANNOUNCED.setdefault(module, set()))
        alone = _visit_by_loop(loss, module, batch, {name: params[name] for name in params if name in slow}, visit)
        losses = losses if len(losses) else alone
    return losses


def _check(loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], known: _Known) -> None:
    """Compare `hooks` with the definition on the last row; parameters that differ use `loop` from now on."""
    row = {key: tensor[-1:] for key, tensor in batch.items()}
    try:
        known.elsewhere |= _differences(loss, module, row, params, known)
    except ValueError:
        raise
    except Exception as error:  # such as nested torch.func transforms; what is wrong with the loss itself fails again
        why = "gradient checkpointing hides its operation" if is_of_checkpointing(error) else first_line(error)
        known.elsewhere |= dict.fromkeys(params, f"one pass for the whole batch fails ({why})")


def _differences(
    loss: Loss, module: nn.Module, row: Batch, params: dict[str, nn.Parameter], known: _Known
) -> dict[str, str]:
    """Return the parameters for which `hooks` and the definition differ on one row, each with the reason."""
    found: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    versions = buffer_versions(module)
    with Precision(module) as seen:
        losses, _ = visit_by_hooks(loss, module, row, list(params), found.__setitem__, known.layouts)
    known.precision = precision = max(known.precision, seen.eps)
    if not found:
        return {}
    again = _visit_by_loop(loss, module, row, {name: params[name] for name in found}, wanted.__setitem__)
    check_loss_is_repeatable(losses, again.reshape(1), module, versions, precision)
    norms = {name: float(grad.double().norm()) for name, grad in wanted.items()}
    different = {}
    for name, grad in found.items():
        off = float((grad.double() - wanted[name].double()).norm())
        limit = TOLERANCE * precision**0.5 * norms[name] + 4 * precision * max(norms.values())
        if off > limit:  # False if the row is not finite
            different[name] = "one backward pass for the batch does not give its gradient"
    return different


def _announce(slow: Mapping[str, str], among: int, announced: set[str]) -> None:
    new = {name: why for name, why in slow.items() if name not in announced}
    if new:
        name, why = next(iter(new.items()))
        more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
        announced |= set(new)
        warnings.warn(
            f"per-sample gradients: {name}{more} of {among} parameters: {why}; they use method 'loop', with one pass "
            "per row. Exclude them for more speed",
            stacklevel=6,
        )


def _visit_by_loop(
    loss: Loss, module: nn.Module, batch: Batch, params: dict[str, nn.Parameter], visit: Visit
) -> Tensor:
    grads: dict[str, list[Tensor]] = {name: [] for name in params}
    losses = []
    with _trained(params.values()):
        for i in range(size_of(batch)):
            value = loss(module, {key: tensor[i : i + 1] for key, tensor in batch.items()}).sum()
            used = value.requires_grad  # False if the loss uses none of the parameters
            if i == 0 and used:
                curvature.graph_leaves(value)  # refuses a graph that hides parameters
            found = gradients_of(value, list(params.values())) if used else [None] * len(params)
            for (name, p), grad in zip(params.items(), found, strict=True):
                grads[name].append(torch.zeros_like(p) if grad is None else grad.to_dense() if grad.is_sparse else grad)
            losses.append(value.detach())
    for name in params:
        visit(name, torch.stack(grads.pop(name)))
    return torch.stack(losses)


class _Bound(nn.Module):
    """The loss as a module, so that `functional_call` can substitute its parameters."""

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
    with warnings.catch_warnings():  # torch warns each time it loops over an operation that it cannot batch
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            grads, losses = torch.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0))(detached, dict(batch))
        except RuntimeError as error:
            raise ValueError(
                f"per-sample gradients: torch.func cannot transform {type(module).__name__} ({first_line(error)}); "
                "use method 'hooks' or 'loop'"
            ) from error
    for name in params:
        visit(name, grads.pop(name))
    return losses  # type: ignore[no-any-return]
