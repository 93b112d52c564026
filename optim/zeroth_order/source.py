"""Gradients without back-propagation, for any rule: random directions, forward passes, and one number per direction.

    source = ZerothOrder(model.named_parameters(), eps=1e-3, seed=0)
    optimizer = SGD(model.named_parameters(), lr=1e-6)           # MeZO; AdamW, Muon or any other works too
    loss = source.step(optimizer, lambda: loss_of(model, batch))  # model in eval mode, the same batch in every call

No graph is built and no gradient is stored, so that the memory is that of inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from optim.curvature.losses import mix
from optim.zeroth_order.exact import exact_gradients
from optim.zeroth_order.forward import directional
from optim.zeroth_order.groups import is_plain, is_separate
from optim.zeroth_order.noise import Directions, NoiseFn
from optim.zeroth_order.replay import Evaluations, Losses, NotFinite, Query, Taken, mean_over_ranks
from optim.zeroth_order.settings import Estimator, check_settings, dropped_shares


class ZerothOrder:
    """A source of gradients that only evaluates the loss: MeZO and its family.

    For each of the `q` standard normal directions z of a step, the projected gradient is

    - pg = (f(p + eps z) - f(p - eps z)) / (2 eps) for "two-sided",
    - pg = (f(p + eps z) - f(p)) / eps for "one-sided", and
    - pg = <grad f, z> for "forward", exactly, by forward-mode differentiation of `module`.

    The gradient is the mean of pg z, an unbiased estimate of the gradient of f smoothed by eps (of f itself for
    "forward"). z is drawn again from its seed whenever it is needed, and weights are changed in place.

    `taken`, the number of steps, is the only state: set it when a run is continued, and the next steps are bit for bit
    those of an uninterrupted run. `last` is the record of the last step. With `torch.distributed` every rank draws the
    same directions, and the losses are averaged: one number per pass. Sharded parameters (DTensor, by rows) have the
    same directions as whole ones.

    Args:
        named_parameters: (name, parameter) pairs; those that require a gradient are used.
        estimator: "two-sided", "one-sided" or "forward".
        eps: The length of the probing step.
        q: The number of directions per step.
        sign: "scalar" uses sign(pg) z as in the published code of ZO-SGD-Sign; "elementwise" sign(pg z) as in its
            paper.
        conserve: Whether plain SGD keeps the best of p, p - lr g and p + lr g; this adds three evaluations.
        sparsity: The share of entries that a direction does not change, by a mask that is kept for `mask_steps` steps.
        mask: "uniform" drops that share. "normal" reproduces an error of the published code, which drops Phi(sparsity)
            (0.69 at 0.5, and never less than half).
        sparse_by: "layer" drops the same share of each tensor; "global" drops the share of its entries that are among
            the smallest of all weights at construction.
        mask_steps: The number of steps with the same mask.
        blocks: A function from name to block, or to None for parameters that do not change; a block has its own
            directions and evaluations.
        block_order: "coordinate" steps each block before the next one is estimated; "joint" estimates all blocks at the
            old weights.
        first_order: A function from name to whether the parameter has its gradient by back-propagation (layers next to
            the loss); the graph begins at the first of them. The gradient is computed at the weights before the step
            and applied with the last block.
        restore: "inplace" subtracts what was added, which leaves a rounding error of about one unit in the last place.
            "copy" keeps a copy of the weights and is exact: use it for 16-bit weights, where that unit is not small.
        seed: The seed of directions and masks.
        module: The model, for "forward".
        noise_fn: Directions that replace drawn ones.
        mask_fn: Masks that replace drawn ones.

    Memory:
        That of inference and one piece of a direction for plain SGD. Other rules add their state and the gradient of
        the largest tensor (all gradients if tensors share something or the optimizer is not from this package).

    Cost:
        2 q forward passes ("one-sided": q + 1, because f(p) is used for all directions). Weights are read and written
        three times per direction ("one-sided": twice), and once more.

    Raises:
        ValueError: For settings that are out of range or exclude each other, and for parameters of the optimizer that
            the source does not know.
        NotFinite: A ValueError, for a loss or a gradient that is not finite (the weights are restored first; blocks
            that were already stepped keep their step).

    Source:
        MeZO, arXiv 2305.17333; ZO-Bench, arXiv 2402.11592 (sign, conservative, momentum, Adam, forward gradient,
        block-wise, hybrid, sparse).

    Differs:
        It has its own generators, where the published code reseeds the global one. Blocks have different directions; in
        the published code they are equal. With q > 1 all directions are evaluated at the same weights and have the same
        mask in estimate and update, and f(p) of "one-sided" is evaluated once, and not once per direction.

    Example:
        >>> from optim import SGD
        >>> from optim.zeroth_order import ZerothOrder
        >>> model = torch.nn.Linear(4, 1)
        >>> source = ZerothOrder(model.named_parameters(), seed=0)
        >>> optimizer = SGD(model.named_parameters(), lr=1e-2)
        >>> losses = [source.step(optimizer, lambda: model(torch.ones(2, 4)).square().mean()) for _ in range(200)]
        >>> losses[-1] < losses[0]
        True
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
            raise ValueError("ZerothOrder: conserve compares steps of all parameters and excludes blocks")
        dropped = dropped_shares(self.params, sparsity, sparse_by) if sparsity else {}
        self.directions = Directions(mask, noise_fn, mask_fn, dropped)
        self.taken = 0
        self.last: Taken | None = None

    # ----------------------------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, closure: Losses) -> float:
        """Take one step of the optimizer with the gradient that this source estimates.

        Args:
            optimizer: The optimizer; gradients (`.grad`) are None afterwards.
            closure: A function that computes the loss. It is called 2 q times ("one-sided": q + 1) without a graph, and
                must return the same loss at the same weights.

        Returns:
            The first loss, which is f(p + eps z) as in the published code (f(p) with "forward" and with conserve).
        """
        return self._step(optimizer, closure, None)

    @torch.no_grad()
    def replay(self, optimizer: torch.optim.Optimizer, steps: Iterable[Taken]) -> None:
        """Repeat recorded steps without evaluating a loss; from equal weights the result is equal bit for bit.

        Learning rates are the current ones of the optimizer: step its schedule between calls if it had one.

        Args:
            optimizer: The optimizer.
            steps: What `last` was after each step.

        Raises:
            ValueError: With first-order parameters, whose gradients are not recorded.
        """
        if self.first_order:
            raise ValueError("ZerothOrder.replay: gradients of first_order parameters are not recorded")
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
        exact: dict[int, Tensor] = {}
        if recorded is None and self.first_order:
            exact = exact_gradients(parts, self.first_order, self.params, self._not_finite)
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
        """Check that this source can step an optimizer, as `step` does before it changes anything.

        Args:
            optimizer: The optimizer.

        Raises:
            ValueError: If it cannot.
        """
        known = {id(p) for p in (*self.params.values(), *self.first_order.values())}
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if id(p) not in known and p.requires_grad:
                    name = (group.get("param_names") or {i: f"number {i}"})[i]
                    raise ValueError(
                        f"ZerothOrder.step: the optimizer has parameter {name!r}, which the source does not have; "
                        "create both from the same named_parameters"
                    )
            if self.conserve and not (is_plain(group) and not group["weight_decay"]):
                raise ValueError(
                    "ZerothOrder: conserve tries three steps and keeps one, and only plain SGD can undo steps; use "
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
        elif run.recorded is None or self.restore == "inplace":  # a replay repeats the rounding, which copies avoid
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
        """Yield a function that sets p to p + c eps z; at the end p is always restored."""
        at = 0.0
        kept = {name: self.params[name].detach().clone() for name in names} if self.restore == "copy" else {}

        def to(place: float) -> None:
            nonlocal at
            way, at = place if kept else place - at, place
            for name in names:
                if kept:  # each point is computed from p, with one rounding
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
        run.note(sum(loss for loss, _ in values), "the current weights")
        return mean_over_ranks(sum(slope for _, slope in values))

    def _not_finite(self, what: str, value: str, number: float) -> NotFinite:
        return NotFinite(
            f"ZerothOrder: the {what} of step {self.taken + 1} is {value}; the weights were restored. "
            f"Lower eps (now {self.eps:g}) or the learning rate, or check the batch",
            number,
        )

    def _conserve(
        self, optimizer: torch.optim.Optimizer, run: Evaluations, queries: Sequence[Query], start: float
    ) -> int:
        """Try p - lr g and p + lr g, keep the best of the three points, and return its factor of lr g.

        Ties are resolved as in the published code; a candidate whose loss is not finite has infinite loss.
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

        minus = plus = math.inf
        if run.recorded is None or not kept:  # a replay that restores copies goes directly to the chosen point
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
        """Step the parameters of the queries' blocks and those with an exact gradient; plain SGD adds factor * lr g."""
        names = {id(p): name for name, p in self.params.items()}
        waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names.get(id(p))
                mine = [q for q in queries if name is not None and self.block_of.get(name) == q.block]
                if id(p) in exact:
                    waiting.append((p, lambda p=p: exact[id(p)]))  # type: ignore[misc]
                elif mine and name is not None and is_plain(group) and self.sign != "elementwise":
                    lr = float(group["lr"])
                    if group["weight_decay"]:
                        p.mul_(1 - lr * group["weight_decay"])
                    self._add_all_(name, p, factor * lr, mine)
                elif mine and name is not None:
                    waiting.append((p, lambda name=name, mine=mine: self._gradient(name, mine)))  # type: ignore[misc]
        if not waiting:
            return
        if all(is_separate(group) for group in optimizer.param_groups):
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
        """Add scale times the mean of the queries' pg z to `target`."""
        for q in queries:
            pg = math.copysign(float(q.projected != 0), q.projected) if self.sign == "scalar" else q.projected
            self.add_direction_(name, target, scale * pg / self.q, q.seed, q.number)

    def add_direction_(self, name: str, target: Tensor, scale: float, seed: int, query: int) -> None:
        """Add scale z to `target` in place, where z is the masked direction of a parameter.

        Args:
            name: The name of the parameter.
            target: A tensor with the parameter's shape and layout.
            scale: The factor.
            seed: The seed of the direction.
            query: The number of the direction within its step.
        """
        self.directions.add_(name, target, scale, seed, query, mix(self.seed, "mask", self.taken // self.mask_steps))
