"""Gradients without back-propagation, for any rule: random directions, forward passes, and one number a direction.

    source = ZerothOrder(model.named_parameters(), eps=1e-3, seed=0)
    optimizer = SGD(model.named_parameters(), lr=1e-6)           # MeZO; AdamW, Muon or any other as well
    loss = source.step(optimizer, lambda: loss_of(model, batch))  # model in eval mode, the same batch in every call

No graph is built and no gradient is kept: the memory of inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.rule import UpdateRule
from optim.rules.sgd import SGDRule
from optim.zeroth_order.forward import directional
from optim.zeroth_order.noise import Directions, NoiseFn, mix
from optim.zeroth_order.replay import Evaluations, Loss, Losses, NotFinite, Query, Taken, mean_over_ranks, ranks
from optim.zeroth_order.settings import Estimator, check_settings, dropped_shares


class ZerothOrder:
    """A source of gradients that evaluates the loss and nothing else: MeZO and its family.

    For each of `q` directions z of a step, standard normal: pg = (f(p + eps z) - f(p - eps z)) / (2 eps) "two-sided",
    (f(p + eps z) - f(p)) / eps "one-sided", or <grad f, z> "forward", exact and by forward-mode differentiation of
    `module`. The gradient is the mean of pg z, an unbiased estimate of that of f smoothed by eps (of f itself,
    "forward"). z is drawn anew from its seed wherever it is needed; weights are moved in place.

    sign: "scalar" takes sign(pg) z, as the published code of ZO-SGD-Sign; "elementwise" sign(pg z), as its paper.
    conserve: plain SGD keeps the best of p, p - lr g and p + lr g, by two more evaluations and one at p.
    sparsity: the share of entries that a direction leaves alone, by a mask kept for `mask_steps` steps. mask "uniform"
    drops that share; "normal" is the published code's slip, which drops Phi(sparsity) (0.69 at 0.5, never below half).
    sparse_by "layer" drops the same share of each tensor; "global" the share of its entries that are among the
    smallest of all weights as they are when this is made.
    blocks: name -> block, or None for parameters that do not move; a block has its own directions and evaluations.
    block_order "coordinate" steps each block before the next is estimated; "joint" all at the old weights.
    first_order: whether a parameter gets its gradient by back-propagation instead (deep layers, next to the loss); the
    graph begins at the first of them. It is taken at the weights before the step, and applied with the last block.
    restore: "inplace" subtracts what was added, which leaves a rounding error of about one unit in the last place;
    "copy" keeps a copy of the weights and is exact: for 16-bit weights, where that unit is not small.
    noise_fn, mask_fn: directions and masks instead of drawn ones.

    State: none but `taken`, the number of steps: set it when a run is continued, and the next steps are bit for bit
    those of a run that was not interrupted. `last` is what the last step was.
    Memory: that of inference and one piece of a direction, for plain SGD; other rules add their state and the largest
    tensor's gradient (all gradients, where a rule's tensors share something or the optimizer is not of this suite).
    Cost: 2 q forward passes ("one-sided": q + 1, for f(p) is that of all directions from there); weights are read and
    written three times a direction ("one-sided": two), and once more.
    With `torch.distributed` every rank draws the same directions, and the losses are averaged: one number a pass.
    Sharded parameters (DTensor, by rows) see the directions that whole ones see.

    Source: MeZO, arXiv 2305.17333; ZO-Bench, arXiv 2402.11592 (sign, conservative, momentum, Adam, forward gradient,
    block-wise, hybrid, sparse).
    Differs: generators of its own, where the published code reseeds the global one; blocks have different directions,
    there the same; with q > 1 all directions are evaluated at the same weights and masked alike in estimate and update,
    and f(p) of "one-sided" once, there for each.
    Raises: ValueError for settings out of range or that exclude each other, and parameters of the optimizer that the
    source does not know; NotFinite, a ValueError, for a loss or a gradient that is not finite (the weights are put back
    first; with several blocks those before keep their step).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        estimator: Estimator = "two-sided",
        eps: float = 1e-3,
        q: int = 1,
        sign: Literal["scalar", "elementwise"] | None = None,
        conserve: bool = False,
        sparsity: float = 0.0,
        mask: Literal["uniform", "normal"] = "uniform",
        sparse_by: Literal["layer", "global"] = "layer",
        mask_steps: int = 1,
        blocks: Callable[[str], str | None] | None = None,
        block_order: Literal["coordinate", "joint"] = "coordinate",
        first_order: Callable[[str], bool] | None = None,
        restore: Literal["inplace", "copy"] = "inplace",
        seed: int = 0,
        module: nn.Module | None = None,
        noise_fn: NoiseFn | None = None,
        mask_fn: NoiseFn | None = None,
    ) -> None:
        self.estimator, self.eps, self.q, self.sign, self.conserve = estimator, eps, q, sign, conserve
        self.mask_steps, self.block_order, self.restore = mask_steps, block_order, restore
        self.seed, self.module = seed, module
        everyone = [(name, p) for name, p in named_parameters if p.requires_grad]
        exact = first_order or (lambda name: False)
        self.first_order = {name: p for name, p in everyone if exact(name)}
        self.params = {name: p for name, p in everyone if name not in self.first_order}
        check_settings(
            self.params, self.first_order, estimator=estimator, eps=eps, q=q, sign=sign, conserve=conserve,
            sparsity=sparsity, mask=mask, sparse_by=sparse_by, mask_steps=mask_steps, block_order=block_order,
            restore=restore, module=module,
        )  # fmt: skip
        block = blocks or (lambda name: "")
        self.block_of = {name: found for name in self.params if (found := block(name)) is not None}
        self.blocks = list(dict.fromkeys(self.block_of.values()))
        if not self.blocks:
            raise ValueError("ZerothOrder: there is no parameter to estimate a gradient of")
        if conserve and len(self.blocks) > 1:
            raise ValueError("ZerothOrder: conserve compares steps of all parameters; it cannot be joined with blocks")
        dropped = dropped_shares(self.params, sparsity, sparse_by) if sparsity else {}
        self.directions = Directions(mask, noise_fn, mask_fn, dropped)
        self.taken = 0
        self.last: Taken | None = None

    # ----------------------------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, closure: Losses) -> float:
        """One step of the optimizer with the gradient that this source estimates; returns the first loss it saw.

        That is f(p + eps z), as in the published code (with "forward" f(p), with conserve f(p)). closure: called 2 q
        times ("one-sided" q + 1) without a graph; it must give the same loss at the same weights. Gradients (`.grad`)
        are None afterwards.
        """
        return self._step(optimizer, closure, None)

    @torch.no_grad()
    def replay(self, optimizer: torch.optim.Optimizer, steps: Iterable[Taken]) -> None:
        """Take recorded steps again, without evaluating anything: bit for bit the weights of the run on equal ones.

        Learning rates are the optimizer's at the time: step its schedule between calls where it had one.
        Raises: ValueError with first-order parameters, whose gradients no record holds.
        """
        if self.first_order:
            raise ValueError("ZerothOrder.replay: gradients of first_order parameters are in no record")
        for taken in steps:
            self.taken = taken.step
            self._step(optimizer, [], taken)

    def _step(self, optimizer: torch.optim.Optimizer, closure: Losses, recorded: Taken | None) -> float:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.check(optimizer)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        parts = [closure] if callable(closure) else list(closure)
        run = Evaluations(self._not_finite, parts, recorded)
        start = run.at_present_weights() if self.conserve else 0.0
        exact = {} if recorded is not None or not self.first_order else self._exact(parts)
        together = [[block] for block in self.blocks] if self.block_order == "coordinate" else [self.blocks]
        kept = -1
        for blocks in together:
            queries = [self._query(run, block, i) for block in blocks for i in range(self.q)]
            if self.conserve:
                kept = self._conserve(optimizer, run, queries, start)
            else:
                self._apply(optimizer, queries, exact if blocks is together[-1] else {})
            run.present = None
        self.last = Taken(self.taken, run.seeds, run.projected, kept, run.losses)
        self.taken += 1
        return run.losses[0] if run.losses else math.nan

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises: ValueError for an optimizer that this source cannot step, as `step` does before anything moves."""
        known = {id(p) for p in (*self.params.values(), *self.first_order.values())}
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if id(p) not in known and p.requires_grad:
                    name = (group.get("param_names") or {i: f"number {i}"})[i]
                    raise ValueError(
                        f"ZerothOrder.step: the optimizer has parameter {name!r}, which the source was not made with; "
                        "give both the same named_parameters"
                    )
            if self.conserve and not (_plain(group) and not group["weight_decay"]):
                raise ValueError(
                    "ZerothOrder: conserve tries three steps and keeps one, which only plain SGD can take back; use "
                    "SGD without momentum and weight decay"
                )

    def _query(self, run: Evaluations, block: str, i: int) -> Query:
        seed = mix(self.seed, self.taken, block, i) if run.recorded is None else run.recorded.seeds[len(run.seeds)]
        names = [name for name in self.params if self.block_of.get(name) == block]
        if run.recorded is not None:
            projected = run.recorded.projected_grad[len(run.seeds)]
        if self.estimator == "forward":
            if run.recorded is None:
                projected = self._directional(run, names, seed, i)
                if not math.isfinite(projected):
                    raise self._not_finite("derivative along a direction", str(projected), projected)
        else:
            with self._moving(names, seed, i) as to:
                to(1.0)
                high = run.evaluate("+eps z")
                if self.estimator == "two-sided":
                    to(-1.0)
                    low = run.evaluate("-eps z")
                else:
                    to(0.0)
                    low = run.at_present_weights()
            if run.recorded is None:
                projected = (high - low) / (2 * self.eps if self.estimator == "two-sided" else self.eps)
        run.seeds.append(seed)
        run.projected.append(projected)
        return Query(block, seed, i, projected)

    @contextmanager
    def _moving(self, names: Sequence[str], seed: int, query: int) -> Iterator[Callable[[float], None]]:
        """Moves p to p + c eps z; at the end, whatever happens, back to p."""
        at = 0.0
        kept = {name: self.params[name].detach().clone() for name in names} if self.restore == "copy" else {}

        def to(place: float) -> None:
            nonlocal at
            way, at = place if kept else place - at, place
            for name in names:
                if kept:  # each place is reached from p: one rounding
                    self.params[name].copy_(kept[name])
                if way:
                    self.add_direction_(name, self.params[name], way * self.eps, seed, query)

        try:
            yield to
        finally:
            to(0.0)

    def _directional(self, run: Evaluations, names: Sequence[str], seed: int, query: int) -> float:
        assert self.module is not None
        tangents = {}
        for name in names:
            tangents[name] = torch.zeros_like(self.params[name], requires_grad=False)
            self.add_direction_(name, tangents[name], 1.0, seed, query)
        values = [directional(self.module, part, tangents) for part in run.parts]
        run.note(sum(loss for loss, _ in values), "the present weights")
        return mean_over_ranks(sum(slope for _, slope in values))

    def _exact(self, parts: Sequence[Loss]) -> dict[int, Tensor]:
        """Gradients of the first-order parameters, by id, from a graph that begins at the first of them."""
        wanted = list(self.first_order.values())
        total: list[Tensor | None] = [None] * len(wanted)
        for p in self.params.values():
            p.requires_grad_(False)
        try:
            with torch.enable_grad():
                for part in parts:
                    grads = torch.autograd.grad(part(), wanted, allow_unused=True)
                    for i, (before, grad) in enumerate(zip(total, grads, strict=True)):
                        total[i] = before if grad is None else grad if before is None else before + grad
        finally:
            for p in self.params.values():
                p.requires_grad_(True)
        found = {id(p): g for p, g in zip(wanted, total, strict=True) if g is not None}
        if ranks() > 1:
            for grad in found.values():
                dist.all_reduce(grad)
                grad.div_(ranks())
        for gradient in found.values():
            if not bool(gradient.isfinite().all()):
                raise self._not_finite("gradient of the last layers", "not finite", math.nan)
        return found

    def _not_finite(self, what: str, value: str, number: float) -> NotFinite:
        return NotFinite(
            f"ZerothOrder: the {what} of step {self.taken + 1} is {value}; the weights are back where they were. "
            f"Lower eps (now {self.eps:g}) or the learning rate, or look at the batch",
            number,
        )

    def _conserve(
        self, optimizer: torch.optim.Optimizer, run: Evaluations, queries: Sequence[Query], start: float
    ) -> int:
        """Try p - lr g and p + lr g, keep the best of the three; which, as a factor of lr g.

        Ties go as in the published code; a candidate whose loss is not finite counts as infinitely bad.
        """
        kept = {n: p.detach().clone() for n, p in self.params.items()} if self.restore == "copy" else {}
        at = 0.0

        def to(place: float) -> None:
            nonlocal at
            for name, p in kept.items():
                self.params[name].copy_(p)
                at = 0.0
            if place != at:
                self._apply(optimizer, queries, {}, place - at)
            at = place

        try:
            to(-1.0)
            minus = run.evaluate("", or_else=math.inf)
            to(1.0)
            plus = run.evaluate("", or_else=math.inf)
        except BaseException:
            to(0.0)
            raise
        if run.recorded is not None:
            choice = run.recorded.kept
        elif minus > start:
            choice = 0 if start < plus else 1
        else:
            choice = -1 if minus < plus else 1
        to(float(choice))
        return choice

    # ----------------------------------------------------------------------------------------------------- updating

    def _apply(
        self,
        optimizer: torch.optim.Optimizer,
        queries: Sequence[Query],
        exact: Mapping[int, Tensor],
        factor: float = -1.0,
    ) -> None:
        """Step the parameters of the queries' blocks, and those with an exact gradient. factor: of lr g, plain SGD."""
        names = {id(p): name for name, p in self.params.items()}
        waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names.get(id(p))
                mine = [q for q in queries if name is not None and self.block_of.get(name) == q.block]
                if id(p) in exact:
                    waiting.append((p, lambda p=p: exact[id(p)]))  # type: ignore[misc]
                elif mine and name is not None and _plain(group) and self.sign != "elementwise":
                    lr = float(group["lr"])
                    if group["weight_decay"]:
                        p.mul_(1 - lr * group["weight_decay"])
                    self._add_all_(name, p, factor * lr, mine)
                elif mine and name is not None:
                    waiting.append((p, lambda name=name, mine=mine: self._gradient(name, mine)))  # type: ignore[misc]
        if not waiting:
            return
        if all(_separate(group) for group in optimizer.param_groups):
            for p, gradient in waiting:  # one tensor's gradient at a time
                p.grad = gradient()
                optimizer.step()
                p.grad = None
            return
        for p, gradient in waiting:
            p.grad = gradient()
        optimizer.step()
        for p, _ in waiting:
            p.grad = None

    def _gradient(self, name: str, queries: Sequence[Query]) -> Tensor:
        gradient = torch.zeros_like(self.params[name], requires_grad=False)
        self._add_all_(name, gradient, 1.0, queries)
        return gradient.sign_() if self.sign == "elementwise" else gradient

    def _add_all_(self, name: str, target: Tensor, scale: float, queries: Sequence[Query]) -> None:
        """target += scale times the mean of the queries' pg z."""
        for q in queries:
            pg = math.copysign(float(q.projected != 0), q.projected) if self.sign == "scalar" else q.projected
            self.add_direction_(name, target, scale * pg / self.q, q.seed, q.number)

    def add_direction_(self, name: str, target: Tensor, scale: float, seed: int, query: int) -> None:
        """Target += scale z, with z the direction of the parameter, masked; target has the parameter's layout."""
        self.directions.add_(name, target, scale, seed, query, mix(self.seed, "mask", self.taken // self.mask_steps))


def _plain(group: Mapping[str, Any]) -> bool:
    """Whether the group's step is p - lr (g + weight_decay p) and nothing else: then no gradient tensor is made."""
    rule = group.get("rule")
    return isinstance(rule, SGDRule) and rule.momentum == 0 and "rounding" not in group


def _separate(group: Mapping[str, Any]) -> bool:
    """Whether the group's tensors may be stepped one after another: rules of this suite that share nothing."""
    rule = group.get("rule")
    return isinstance(rule, UpdateRule) and type(rule).share is UpdateRule.share
