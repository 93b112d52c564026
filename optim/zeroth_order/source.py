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
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.rule import UpdateRule
from optim.rules.sgd import SGDRule
from optim.sharding import is_sharded
from optim.zeroth_order.forward import directional
from optim.zeroth_order.noise import add_normal_, add_pieces_, masked, mix, pieces

Loss: TypeAlias = Callable[[], Any]
Losses: TypeAlias = Loss | Sequence[Loss]
"""A function that computes the loss, a number or a tensor of one; or several (micro-batches) whose sum is the loss."""

NoiseFn: TypeAlias = Callable[[str, torch.Size, int, int], Tensor]
"""(name, shape, seed, query) -> the direction, or the mask (1 where it is dropped): recorded ones, for tests."""

Estimator = Literal["two-sided", "one-sided", "forward"]


@dataclass(frozen=True)
class Taken:
    """What one step was: enough to take it again on other weights (`ZerothOrder.replay`), some 12 bytes.

    step: its number. seeds, projected_grad: one of each direction, blocks outermost. kept: -1, 0 or 1, which candidate
    p + kept * lr * g a conservative step chose; -1 otherwise. losses: every evaluation, in call order.
    """

    step: int
    seeds: list[int]
    projected_grad: list[float]
    kept: int = -1
    losses: list[float] = field(default_factory=list)


class NotFinite(ValueError):
    """A loss or a gradient that is not finite (`value`): the step was not taken."""

    def __init__(self, text: str, value: float) -> None:
        super().__init__(text)
        self.value = value


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
        self.sparsity, self.mask, self.mask_steps = sparsity, mask, mask_steps
        self.block_order, self.restore, self.seed = block_order, restore, seed
        self.module, self.noise_fn, self.mask_fn = module, noise_fn, mask_fn
        everyone = [(name, p) for name, p in named_parameters if p.requires_grad]
        exact = first_order or (lambda name: False)
        self.first_order = {name: p for name, p in everyone if exact(name)}
        self.params = {name: p for name, p in everyone if name not in self.first_order}
        self._check(sparse_by)
        block = blocks or (lambda name: "")
        self.block_of = {name: found for name in self.params if (found := block(name)) is not None}
        self.blocks = list(dict.fromkeys(self.block_of.values()))
        if not self.blocks:
            raise ValueError("ZerothOrder: there is no parameter to estimate a gradient of")
        if conserve and len(self.blocks) > 1:
            raise ValueError("ZerothOrder: conserve compares steps of all parameters; it cannot be joined with blocks")
        self.dropped = _dropped(self.params, sparsity, sparse_by) if sparsity else {}
        self.taken = 0
        self.last: Taken | None = None

    def _check(self, sparse_by: str) -> None:
        for key, value, known in (
            ("estimator", self.estimator, get_args(Estimator)),
            ("sign", self.sign, (None, "scalar", "elementwise")),
            ("mask", self.mask, ("uniform", "normal")),
            ("sparse_by", sparse_by, ("layer", "global")),
            ("block_order", self.block_order, ("coordinate", "joint")),
            ("restore", self.restore, ("inplace", "copy")),
        ):
            if value not in known:
                raise ValueError(f"ZerothOrder: {key} = {value!r}; it must be one of {', '.join(map(repr, known))}")
        if not _number(self.eps) or not 0 < self.eps < math.inf:
            raise ValueError(f"ZerothOrder: eps = {self.eps!r}; it must be a finite number above 0")
        if not _number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ValueError(f"ZerothOrder: sparsity = {self.sparsity!r}; it must be a number with 0 <= sparsity < 1")
        for key, count in (("q", self.q), ("mask_steps", self.mask_steps)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"ZerothOrder: {key} = {count!r}; it must be a whole number of at least 1")
        if self.estimator == "forward" and self.module is None:
            raise ValueError("ZerothOrder: estimator 'forward' differentiates the model; give it as module=")
        if self.conserve and self.first_order:
            raise ValueError("ZerothOrder: conserve compares zeroth-order steps; it cannot be joined with first_order")
        for name, p in [*self.params.items(), *self.first_order.items()]:
            if not p.is_floating_point():
                raise ValueError(f"ZerothOrder: parameter {name!r} is {p.dtype}; expected real floating-point ones")

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
        run = _Evaluations(self, parts, recorded)
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

    def _query(self, run: _Evaluations, block: str, i: int) -> _Query:
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
        return _Query(block, seed, i, projected)

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
                    self._add_(name, self.params[name], way * self.eps, seed, query)

        try:
            yield to
        finally:
            to(0.0)

    def _directional(self, run: _Evaluations, names: Sequence[str], seed: int, query: int) -> float:
        assert self.module is not None
        tangents = {}
        for name in names:
            tangents[name] = torch.zeros_like(self.params[name], requires_grad=False)
            self._add_(name, tangents[name], 1.0, seed, query)
        values = [directional(self.module, part, tangents) for part in run.parts]
        run.note(sum(loss for loss, _ in values), "the present weights")
        return _mean_over_ranks(sum(slope for _, slope in values))

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
        if _ranks() > 1:
            for grad in found.values():
                dist.all_reduce(grad)
                grad.div_(_ranks())
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
        self, optimizer: torch.optim.Optimizer, run: _Evaluations, queries: Sequence[_Query], start: float
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
        queries: Sequence[_Query],
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

    def _gradient(self, name: str, queries: Sequence[_Query]) -> Tensor:
        gradient = torch.zeros_like(self.params[name], requires_grad=False)
        self._add_all_(name, gradient, 1.0, queries)
        return gradient.sign_() if self.sign == "elementwise" else gradient

    def _add_all_(self, name: str, target: Tensor, scale: float, queries: Sequence[_Query]) -> None:
        """target += scale times the mean of the queries' pg z."""
        for q in queries:
            pg = math.copysign(float(q.projected != 0), q.projected) if self.sign == "scalar" else q.projected
            self._add_(name, target, scale * pg / self.q, q.seed, q.number)

    def _add_(self, name: str, target: Tensor, scale: float, seed: int, query: int) -> None:
        """target += scale z, with z the direction of the parameter, masked; target has the parameter's layout."""
        if self.noise_fn is not None:
            z = self.noise_fn(name, target.shape, seed, query).to(target)
            if self.dropped:
                z = z * (1 - self._mask_given(name, target)) if self.mask_fn is not None else z
            target.add_(z, alpha=scale)
            return
        local, total, start = _local(name, target)
        if not self.dropped:
            add_normal_(local, scale, mix(seed, name), total=total, start=start)
            return
        where: dict[str, Any] = {"start": start, "count": local.numel(), "device": local.device}
        draws: Literal["normal", "uniform"] = "normal" if self.mask == "normal" else "uniform"
        z_pieces = pieces("normal", mix(seed, name), total, **where)
        m_pieces = pieces(draws, mix(self._mask_seed(), name), total, **where)
        add_pieces_(local, masked(z_pieces, m_pieces, self.dropped[name]), scale)

    def _mask_seed(self) -> int:
        return mix(self.seed, "mask", self.taken // self.mask_steps)

    def _mask_given(self, name: str, target: Tensor) -> Tensor:
        assert self.mask_fn is not None
        return self.mask_fn(name, target.shape, self._mask_seed(), 0).to(target)


@dataclass(frozen=True)
class _Query:
    block: str
    seed: int
    number: int
    projected: float


class _Evaluations:
    """The losses of one step, in call order; none are computed where the step is a recorded one."""

    def __init__(self, source: ZerothOrder, parts: Sequence[Loss], recorded: Taken | None) -> None:
        self.source, self.parts, self.recorded = source, parts, recorded
        self.losses: list[float] = []
        self.present: float | None = None  # the loss at the weights that all directions start from, once it is known
        self.seeds: list[int] = []
        self.projected: list[float] = []

    def evaluate(self, where: str, *, or_else: float | None = None) -> float:
        if self.recorded is not None:
            return 0.0
        return self.note(sum(_value(part()) for part in self.parts), where, or_else)

    def at_present_weights(self) -> float:
        """Evaluated once, until `present` is forgotten."""
        if self.present is None:
            self.present = self.evaluate("the present weights")
        return self.present

    def note(self, loss: float, where: str, or_else: float | None = None) -> float:
        """or_else: what a loss that is not finite counts as, instead of an error."""
        loss = _mean_over_ranks(loss)
        if not math.isfinite(loss) and or_else is not None:
            loss = or_else
        elif not math.isfinite(loss):
            raise self.source._not_finite("loss", f"{loss} at {where}", loss)
        self.losses.append(loss)
        return loss


def _value(loss: Any) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(group: Mapping[str, Any]) -> bool:
    """Whether the group's step is p - lr (g + weight_decay p) and nothing else: then no gradient tensor is made."""
    rule = group.get("rule")
    return isinstance(rule, SGDRule) and rule.momentum == 0 and "rounding" not in group


def _separate(group: Mapping[str, Any]) -> bool:
    """Whether the group's tensors may be stepped one after another: rules of this suite that share nothing."""
    rule = group.get("rule")
    return isinstance(rule, UpdateRule) and type(rule).share is UpdateRule.share


def _local(name: str, target: Tensor) -> tuple[Tensor, int, int]:
    """(what this process has of the tensor, entries of all of it, the first of them that is here)."""
    if not is_sharded(target):
        return target, target.numel(), 0
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(target, DTensor)
    if any(not isinstance(p, Replicate) and p != Shard(0) for p in target.placements):
        raise ValueError(
            f"ZerothOrder: parameter {name!r} is sharded as {target.placements}; only by rows (Shard(0), as FSDP2 does)"
        )
    _, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    row = target.numel() // max(1, target.shape[0]) if target.ndim else 1
    return target.to_local(), target.numel(), (offset[0] if offset else 0) * row


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _mean_over_ranks(value: float) -> float:
    """The mean of the ranks' values, the same bits on every one of them."""
    if _ranks() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return float(shared) / _ranks()


def _mezo_decays(name: str) -> bool:
    return not any(part in name for part in ("bias", "layer_norm", "layernorm"))


def decay_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    *,
    decay_filter: Callable[[str], bool] = _mezo_decays,
) -> list[dict[str, Any]]:
    """Two param groups, with and without weight decay; by default MeZO's rule on names.

    MeZO and the forward gradient step p <- p - lr (pg z + weight_decay p), which is this suite's decoupled decay.
    """
    named = list(named_parameters)
    groups = [([e for e in named if decay_filter(e[0]) == decayed], decayed) for decayed in (True, False)]
    return [{"params": part, "weight_decay": weight_decay if decayed else 0.0} for part, decayed in groups if part]


_SAMPLE = 10_000_000


def _dropped(params: Mapping[str, Tensor], sparsity: float, sparse_by: str) -> dict[str, float]:
    """The share of each tensor's entries that a mask drops."""
    if sparse_by == "layer":
        return dict.fromkeys(params, sparsity)
    total = sum(p.numel() for p in params.values())
    stride = math.ceil(total / _SAMPLE)  # every k-th entry: a sample that needs no generator
    magnitudes = {name: p.detach().flatten()[::stride].abs().float() for name, p in params.items()}
    everything = torch.cat(list(magnitudes.values()))
    rank = max(1, math.ceil(sparsity * len(everything)))
    threshold = everything.kthvalue(rank).values
    return {name: float((m <= threshold).float().mean()) if len(m) else 0.0 for name, m in magnitudes.items()}
