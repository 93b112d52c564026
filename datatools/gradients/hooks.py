"""Per-sample gradients of a whole batch from one backward pass, which computes no weight gradients.

    matrix [out, in]:  G_i = sum_s g_is x_is^T            bias [out]:  sum_s g_is

g_is is the gradient of a layer's output at token s of row i, and x_is its input; `rows.py` finds the row of each token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datatools.gradients import rows
from datatools.gradients.derived import Derived
from datatools.gradients.factors import Factors, Picks, Product, TakeFactors
from datatools.gradients.layers import adapters
from datatools.gradients.lookups import Lookup
from datatools.gradients.lora import watch_adapter
from datatools.gradients.replay import NotByRows, Replayed
from datatools.gradients.types import Batch, Loss, Visit, size_of
from datatools.gradients.uses import Use
from datatools.gradients.watch import Watch
from optim import curvature


class _Start(torch.autograd.Function):
    """The start of the graph: its output requires a gradient although its input does not.

    The output is a copy, so that a model may change it in place, which is not allowed for a leaf.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Join(torch.autograd.Function):
    """Several outputs of one operation, whose gradients arrive together."""

    @staticmethod
    def forward(ctx: Any, arrived: Callable[[tuple[Tensor, ...]], None], _: Tensor, *outputs: Tensor) -> Any:
        ctx.arrived = arrived
        return tuple(y.clone() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.arrived(grads)
        return None, None, *grads


@dataclass
class _Call:
    """One use in this pass, with the results of backward passes."""

    use: Use
    key: tuple[str, int, int]
    layout: rows.Layout | None
    shape: torch.Size
    """Shape of the output."""
    guard: tuple[Tensor, int] | None = None
    """(output, version): a hook on a view is lost if the view is changed in place, which must be detected."""
    weighted: list[Tensor] = field(default_factory=list)


def visit_by_hooks(
    loss: Loss,
    module: nn.Module,
    batch: Batch,
    names: Sequence[str],
    visit: Visit,
    layouts: rows.Layouts,
    take: TakeFactors | None = None,
    above: int = 0,
) -> tuple[Float[Tensor, " b"], dict[str, str]]:
    """Call `visit` for each parameter in `names` except those that need another method.

    Call it inside `enable_grad`, with no parameter requiring a gradient.

    Args:
        loss: (module, batch) -> losses, floating dtype [b].
        module: the model, in eval mode.
        batch: name -> tensor [b, ...].
        names: names of parameters.
        visit: receives a name and its gradients [b, *shape].
        layouts: layouts of the module's layers, which may be extended.
        take: receives gradients of matrices as factors; None if each is to be visited.
        above: bytes of per-sample gradients of a matrix above which they are given as factors.

    Returns:
        The losses [b], detached, and parameter -> reason for those not visited.

    Raises:
        ValueError: if the loss is not one value per row.

    """
    return _Pass(module, batch, names, visit, layouts, take, above).run(loss)


class _Pass:
    def __init__(
        self, module: nn.Module, batch: Batch, names: Sequence[str], visit: Visit, layouts: rows.Layouts,
        take: TakeFactors | None, above: int,
    ) -> None:  # fmt: skip
        self.module, self.batch, self.visit, self.layouts = module, batch, visit, layouts
        self.take, self.above = take, above
        self.factors: dict[str, Factors] = {}
        self.size = size_of(batch)
        known = dict(module.named_parameters())
        self.params = {name: known[name] for name in names}
        self.refused: dict[str, str] = {}
        self.calls: list[_Call] = []
        self.waiting: Counter[str] = Counter()  # for each parameter, calls without a gradient so far
        self.totals: dict[str, Tensor] = {}
        self.made: dict[str, Derived] = {}
        self.done: set[str] = set()
        self.weighing = False
        self.dtype = torch.float32
        self.anchor = torch.zeros((), requires_grad=True)

    def run(self, loss: Loss) -> tuple[Tensor, dict[str, str]]:
        layers = [one for one in adapters(self.module) if {one.name_a, one.name_b} & set(self.params)]
        inside = {name for one in layers for name in (one.name_a, one.name_b)}
        watched = {name: p for name, p in self.params.items() if name not in inside}
        with ExitStack() as stack:
            for one in layers:
                stack.enter_context(watch_adapter(one, watched.values(), self.used))
            if watched:
                fixed = [*(p for p in self.module.parameters()), *self.module.buffers()]
                stack.enter_context(Watch(watched, self, self.size, fixed))
            losses = loss(self.module, self.batch)
        if losses.shape != (self.size,):
            raise ValueError(
                f"per-sample gradients: the loss gave shape {tuple(losses.shape)}, expected one value per row, "
                f"({self.size},)"
            )
        for call in self.calls:
            if call.guard is not None and call.guard[0]._version != call.guard[1]:
                self._refuse(call.use, "its layer's output is changed in place")
        if losses.requires_grad:
            self._backward(losses)
        for name in (*self.factors, *reversed(self.made)):  # those whose gradients did not arrive from every call
            if name in self.totals or name in self.factors:
                with torch.no_grad():
                    self._complete(name)
        for name, p in self.params.items():
            if name not in self.done and name not in self.refused:  # the loss does not use it, or not in every call
                total = self.totals.pop(name, None)
                self.visit(name, p.new_zeros(self.size, *p.shape) if total is None else total)
        return losses.detach(), self.refused

    def _backward(self, losses: Tensor) -> None:
        # leaves of other modules are not to get a `.grad`, but their paths are to be followed
        leaves = curvature.graph_leaves(losses)
        unknown = [call for call in self.calls if self.size > 1 and call.layout is None and self._wanted(call.use)]
        if unknown:
            self.dtype = min((losses.dtype, *(p.dtype for p in self.module.parameters())), key=_range)
            self.weighing = True
            for weights in rows.weightings(self.size, self.dtype):
                weights = weights.to(losses.device, losses.dtype)
                torch.autograd.grad((losses * weights).sum(), leaves, retain_graph=True, allow_unused=True)
            self.weighing = False
        torch.autograd.grad(losses.sum(), leaves, allow_unused=True)

    def _wanted(self, use: Use) -> bool:
        return any(self._asked(name) for name in use.names)

    def _asked(self, name: str) -> bool:
        """Return whether a gradient is still asked for: of a parameter, or of a tensor derived from such a one."""
        if name in self.made:
            return any(self._asked(parent) for parent in self.made[name].parents)
        return name in self.params and name not in self.refused

    def _refuse(self, use: Use, why: str) -> None:
        for name in use.names:
            self.opaque(name, why)

    def opaque(self, name: str, why: str) -> None:
        """Leave a parameter, or those that a tensor is derived from, to another method."""
        self.totals.pop(name, None)
        self.factors.pop(name, None)
        if name in self.made:
            for parent in self.made[name].parents:
                self.opaque(parent, why)
        elif name in self.params and name not in self.done:
            self.refused.setdefault(name, why)

    def derived(self, made: Derived) -> None:
        """Note a tensor that was computed from parameters alone: its gradients go on to them when they are complete."""
        self.made[made.name] = made
        self.waiting.update(list(made.parents))

    def joined(self, use: Replayed, outputs: list[Tensor]) -> list[Tensor]:
        """Register a use with several outputs, whose gradients must arrive together."""
        call = self._call(use, torch.Size(), None)
        return list(_Join.apply(lambda grads: self._arrived([call], grads), self.anchor, *outputs))  # type: ignore[no-untyped-call]

    def used(self, uses: list[Use], y: Tensor, in_place: bool) -> Tensor:
        """Register a hook on the output `y` of these uses; start the graph here if no earlier tensor is part of one."""
        if not y.requires_grad:
            y = _Start.apply(y, self.anchor)  # type: ignore[no-untyped-call]
        whole, guard = y, None
        if y._is_view():
            base = y._base
            if (
                not in_place
                and base is not None
                and base.numel() == y.numel()
                and base.is_contiguous()
                and y.is_contiguous()
            ):
                whole = base  # a hook on the view itself would be lost if the model changed it in place
            else:
                guard = (y, y._version)
        calls = [self._call(use, y.shape, guard) for use in uses]
        whole.register_hook(lambda g: self._arrived(calls, g))  # type: ignore[no-untyped-call]
        return y

    def _call(self, use: Use, shape: torch.Size, guard: tuple[Tensor, int] | None) -> _Call:
        key = (use.names[0], self.waiting[use.names[0]], len(use.tokens))
        layout = None if use.routed else self.layouts.of(key, use.tokens, self.batch)
        call = _Call(use, key, layout, shape, guard)
        self.waiting.update(use.names)
        self.calls.append(call)
        return call

    def _arrived(self, calls: list[_Call], g: Tensor | tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            for call in calls:
                if isinstance(g, Tensor):
                    aligned = call.use.align(g.detach().reshape(call.shape))
                else:
                    assert isinstance(call.use, Replayed)
                    aligned = call.use.joined(g)
                aligned = aligned.reshape(call.use.tokens.numel(), aligned.shape[-1])
                if self.weighing:
                    if call.layout is None and self._wanted(call.use):
                        call.weighted.append(rows.sizes(aligned))
                    continue
                if self._wanted(call.use):
                    try:
                        self._add(call, aligned)
                    except NotByRows:
                        self._refuse(call.use, "rows of its operation depend on each other")
                call.use.x = None
                for name in call.use.names:
                    self._one_less(name)

    def _one_less(self, name: str) -> None:
        """Count a use whose gradient has arrived; after the last one, the parameter is visited."""
        self.waiting[name] -= 1
        if not self.waiting[name] and (name in self.totals or name in self.factors):
            self._complete(name)

    def _complete(self, name: str) -> None:
        if name in self.factors:
            assert self.take is not None
            self.done.add(name)
            return self.take(self.factors.pop(name))
        total = self.totals.pop(name)
        if name not in self.made:
            self.done.add(name)
            return self.visit(name, total)
        made = self.made[name]
        grads = made.push(total)
        for parent in made.parents:
            if self._asked(parent) and parent in grads:
                total = self._total(parent)
                total += grads[parent]
            self._one_less(parent)

    def _add(self, call: _Call, g: Tensor) -> None:
        """Add the contribution of this call to the gradients of its parameters; g [n, out]."""
        use = call.use
        x = None if use.x is None else use.x.reshape(len(g), use.x.shape[-1])
        layout = call.layout
        if self.size == 1 and not use.routed:
            layout = "blocks"
        if layout is not None:
            return self._add_regular(use, layout, x, g)
        of_token = torch.zeros(len(g), dtype=torch.int64)
        if self.size > 1:
            found = rows.identify(call.weighted, rows.sizes(g), self.size, self.dtype)
            if found is None:
                return self._refuse(use, "some tokens of its layer do not belong to a single row of the batch")
            of_token = found
            if not use.routed:
                self.layouts.learn(call.key, use.tokens, self.batch, found)
                layout = self.layouts.of(call.key, use.tokens, self.batch)
                if layout is not None:
                    return self._add_regular(use, layout, x, g)
        self._add_routed(use, of_token, x, g)

    def _add_regular(self, use: Use, layout: rows.Layout, x: Tensor | None, g: Tensor) -> None:
        def batched(flat: Tensor) -> Tensor:
            if layout == "blocks":
                return flat.reshape(self.size, -1, flat.shape[-1])
            assert isinstance(layout, int)
            return flat.reshape(*use.tokens, -1).movedim(layout, 0).reshape(self.size, -1, flat.shape[-1])

        if self._keeps(use, None if x is None else batched(x), batched(g)):
            return None
        if isinstance(use, Lookup) and use.view.name in self.totals and not use.view.steps:  # tied with the head
            assert x is not None
            return use.add(self.totals[use.view.name], batched(x), batched(g))
        for name, grad in use.contract(None if x is None else batched(x), batched(g)).items():
            if not self._asked(name):
                continue
            if name not in self.totals and name not in self.factors and not use.view.steps:
                self.totals[name] = grad.to(self._tensor(name).dtype)
            else:
                use.scatter(self._total(name), slice(None), grad, None)

    def _keeps(self, use: Use, x: Tensor | None, g: Tensor) -> bool:
        """Keep the factors of a large gradient instead of the gradient, where all uses so far allow it."""
        name = use.view.name
        p = self.params.get(name)
        if self.take is None or p is None or name in self.totals or use.view.steps or p.ndim != 2 or x is None:
            return False
        if type(use) not in (Use, Lookup) or self.size * p.nbytes <= self.above:
            return False
        if self.above == 0 and x.shape[1] * sum(p.shape) >= p.numel():
            return False  # the gradient is smaller than its factors
        if isinstance(use, Lookup):
            ids = x[..., 0]
            kept = g if use.padding is None else g * (ids != use.padding)[..., None]
            term: Product | Picks = Picks(ids, kept)
        else:
            g = g.to(x.dtype)
            term = Product(g, x) if use.out_first else Product(x, g)
        self.factors.setdefault(name, Factors(name, p.shape, p.dtype)).terms.append(term)
        return True

    def _add_routed(self, use: Use, of_token: Tensor, x: Tensor | None, g: Tensor) -> None:
        everyone: list[tuple[int | None, Any]] = [(None, slice(None))]
        for expert, tokens in use.groups() if use.groups is not None else everyone:
            tokens = tokens.cpu() if isinstance(tokens, Tensor) else tokens
            owners = of_token[tokens]
            places = torch.arange(len(of_token))[tokens]
            for row in sorted(set(owners.tolist())):
                if row < 0:  # tokens with zero gradients
                    continue
                at = places[owners == row].to(g.device)
                grads = use.contract(None if x is None else x[None, at], g[None, at])
                for name, grad in grads.items():
                    if self._asked(name):
                        use.scatter(self._total(name), slice(row, row + 1), grad, expert)

    def _total(self, name: str) -> Tensor:
        if name in self.factors:  # another use has no factors
            self.totals[name] = self.factors.pop(name).dense()
        elif name not in self.totals:
            p = self._tensor(name)
            self.totals[name] = p.new_zeros(self.size, *p.shape)
        return self.totals[name]

    def _tensor(self, name: str) -> Tensor:
        return self.made[name].value if name in self.made else self.params[name]


def _range(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else float("inf")
