"""Own moments: apply the rule itself in the new order to estimated gradients (spec B.1).

    g~_t = gradient of batch l_t at the new order's parameters at position t, estimated
    state, gamma <- the rule's own step on g~_t, with weight decay and clipping as in training

Given the gradients, nothing is approximate: the moments are the new order's own, for any rule. Gradients are estimated
in one of four ways:

- "exact": g + H d at the closest anchor, where d is the distance from it. This takes a gradient and a Hessian-vector
  product per step of every order, more than retraining: an oracle, exact on quadratics with an anchor at every step.
- "none": g at the closest anchor, without H d.
- "anchors": gradients of all batches at the anchors, computed once and interpolated in t, which captures the drift that
  all orders share; and for deviations of an order from it, their change along the k directions in which simulated
  orders deviate most, by central differences over the distance that those reach (a secant, which represents the loss
  over the range of the orders better than its tangent does). A score takes no further passes.
- "rows": the same gradients at the anchors; and for deviations, the change of the gradient of a few rows of the batch
  (`Problem.samples`), s_l(here) - s_l(there): a control variate, correct to all orders of the distance if the rows
  represent the batch. A score takes one small gradient per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.question import Question
from datatools.order.estimators.stored import Stored, interpolated, stepped_together
from datatools.order.estimators.surrogate import CURVATURE_LIMIT, DRIFT_LIMIT, LIMIT_BYTES, Surrogate, random_orders
from datatools.order.problem import Cost, Diverged, Params, Problem
from datatools.order.recipe import States
from datatools.order.reference_run import ReferenceRun

Gradients = Literal["anchors", "rows", "exact", "none"]
_SIMULATED = 12  # random orders whose paths determine the directions
_REPLAYED = 8  # random orders that determine the spread of ends
_TOGETHER = 1 << 24  # largest number of parameters, over all orders, that are stepped at a time


@dataclass(frozen=True, eq=False)
class Moments(Surrogate):
    """The estimate of `precompute`: `final(order)` returns parameters, `score` the held-out loss at these.

    Attributes:
        reference: the recorded run.
        problem: the batches and their loss.
        hessian: how gradients are estimated.
        stored: the stored gradients; None for "exact" and "none".
        replay: see the function `replay`; 0 if the reference order is exact by construction ("exact" and "none").
        paths: order -> its indicators, for orders that were scored.

    """

    name: ClassVar[str] = "moments"
    title: ClassVar[str] = "the order's own moments, stepped by the rule on stored gradients"
    once: ClassVar[str] = "a gradient per batch and anchor"
    each: ClassVar[str] = "T steps of the rule"
    source: ClassVar[str] = "own"
    limits: ClassVar[Mapping[str, float]] = {"curvature": CURVATURE_LIMIT, "drift": DRIFT_LIMIT, "replay": 0.2}
    """`replay` is measured along the held-out gradient: the error for the reference order, whose true result is known,
    relative to the differences between orders (the function `replay`). Beyond its limit, rankings of a small Llama are
    no longer reliable (`python -m tests.benchmarks.order --rates 1e-4,3e-4,1e-3,3e-3`).
    """
    keeps_gradients: ClassVar[bool] = True

    reference: ReferenceRun
    problem: Problem
    hessian: Gradients
    stored: Stored | None = None
    replay: float = 0.0
    paths: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Moments:
        """Call the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Count one gradient per batch and anchor, all of which are stored."""
        kept = question.settings.anchors * question.batches
        return Cost(gradients=kept + question.held_out, bytes=4 * kept * question.parameters)

    def final(self, sequence: Sequence[int | None]) -> Params:
        """Estimate the parameters after the last step.

        Args:
            sequence: a permutation of the reference's sequence; None skips a step.

        Returns:
            Name -> [*shape].

        """
        return self._layout.tensors(self._run([sequence])[0][0])

    @property
    def _layout(self) -> Layout:
        return Layout.of(self.reference.start.params)

    def _run(
        self, sequences: Sequence[Sequence[int | None]], observe: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """Compute the final parameters [R, p] of R orders that are stepped together, and the indicators of each path.

        A step that is None in all of them is skipped. `observe` is called after each step with (position, [R, p]).
        """
        start, count = self._layout.vector(self.reference.start.params), len(sequences)
        here = start.expand(count, -1)
        states: States = {
            name: {key: value.to(start.device).expand(count, *value.shape) for key, value in state.items()}
            for name, state in self.reference.start.states.items()
        }
        curvature = torch.zeros(count)
        for t in range(len(sequences[0])):
            batches = [batch for s in sequences if (batch := s[t]) is not None]
            if not batches:
                continue
            rows = [self._or_nan(t, batch, place) for batch, place in zip(batches, here, strict=True)]
            grads = torch.stack([grad for grad, _ in rows])
            curvature = torch.maximum(curvature, torch.tensor([ratio for _, ratio in rows]))
            here, states = stepped_together(self.reference.recipe, self._layout, here, states, grads, t)
            if observe is not None:
                observe(t, here)
        end = self._layout.vector(self.reference.end.params)
        drift = (here - end).norm(dim=1) / (end - start).norm().clamp_min(1e-30)
        worst = [{"curvature": c, "drift": d} for c, d in zip(curvature.tolist(), drift.tolist(), strict=True)]
        return here, worst

    def _or_nan(self, t: int, batch: int, place: Tensor) -> tuple[Tensor, float]:
        """Return `_gradient`, or nan once a run has diverged, so that the runs of other orders can continue."""
        try:
            return self._gradient(t, batch, place)
        except Diverged:
            return torch.full_like(place, math.nan), math.nan

    def _gradient(self, t: int, batch: int, place: Tensor) -> tuple[Tensor, float]:
        """Estimate the gradient [p] at the parameters `place` [p], and ||H d|| / ||g||."""
        if self.stored is not None:
            known, change = self.stored(batch, place, t)
            if self.stored.sampled is not None:
                there = interpolated(self.stored.sampled[:, batch], self.stored.positions, t)
                sample = self.problem.sample_gradient(self._layout.tensors(place), batch)
                change = self._layout.vector(sample) - there
            return known + change, float(change.norm() / known.norm().clamp_min(1e-30))
        layout, anchor = self._layout, self.reference.nearest(t).params
        strayed = place - layout.vector(anchor)
        grads = layout.vector(self.problem.gradient(anchor, batch))
        if self.hessian == "none" or not bool(strayed.any()):
            return grads, 0.0
        product = layout.vector(self.problem.hvp(anchor, batch, layout.tensors(strayed)))
        return grads + product, float(product.norm() / grads.norm().clamp_min(1e-30))

    def _scores(self, sequences: Tensor) -> Tensor:
        losses: list[float] = []
        together = max(1, _TOGETHER // self._layout.size)
        for part in torch.split(sequences, together):
            ends, worst = self._run(part.tolist())
            losses += [self.problem.held_out_loss(self._layout.tensors(end)) for end in ends]
            self.paths.update(zip(map(tuple, part.tolist()), worst, strict=True))
        return torch.tensor(losses, dtype=torch.float64)

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Return replay, drift and curvature; they cost nothing for an order that was scored.

        `drift` is the distance from the reference's end relative to the length of the reference's path. `curvature` is
        ||H d|| / ||g|| along the path, given where the change of gradients is linear.
        """
        self.reference.check(sequence)
        key = tuple(map(int, sequence))
        if key not in self.paths:
            self.paths[key] = self._run([key])[1][0]
        path = {"replay": self.replay} | self.paths[key]
        return path if self.hessian != "rows" else {k: v for k, v in path.items() if k != "curvature"}


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    hessian: Gradients = "anchors",
    directions: int = 0,
    limit_bytes: int = LIMIT_BYTES,
    seed: int = 0,
) -> Moments:
    """Compute the estimate from a reference run.

    Cost of "anchors": A n gradients, and 2 k n for the directions. Memory: (A + k) n p numbers.
    Cost of "rows": A n gradients of batches and of samples, and T gradients of samples for `replay` and for each score.
    Memory: 2 A n p numbers. Both take the held-out gradient, for `replay`.

    Args:
        reference: the recorded run.
        problem: the batches and their loss; "rows" needs `samples`.
        hessian: how gradients are estimated, one of the four ways of this module.
        directions: k, for "anchors".
        limit_bytes: largest size of stored gradients, in bytes.
        seed: seed of simulated orders.

    Returns:
        The estimate.

    Raises:
        UsageError: if an option is invalid.
        EnvironmentProblem: if stored gradients exceed `limit_bytes`.

    """
    if hessian not in ("anchors", "rows", "exact", "none"):
        raise UsageError(f"order: moments has no gradients {hessian!r}; choose anchors, rows, exact or none")
    if directions < 0 or (directions and hessian != "anchors"):
        raise UsageError(
            f"order: moments with {directions} directions and hessian={hessian!r}; use 0 or more, with 'anchors'"
        )
    if hessian in ("exact", "none"):
        return Moments(reference.sequence, Cost(), reference, problem, hessian)
    before, n = problem.cost.gradients, len(problem.batches)
    layout = Layout.of(reference.start.params)
    like = next(iter(reference.start.params.values()))
    tables = len(reference.anchors) * (2 if hessian == "rows" else 1) + directions
    need = tables * n * layout.size * like.element_size()
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: gradients of {n} batches at {len(reference.anchors)} anchors, along {directions} directions, need "
            f"{need / 2**30:.1f} GiB, more than {limit_bytes / 2**30:.1f}; use fewer, adapters (LoRA), or pairwise"
        )

    def at_anchors(gradient: Callable[[Params, int], Params]) -> Tensor:
        table = like.new_empty(len(reference.anchors), n, layout.size)
        for a, anchor in enumerate(reference.anchors):
            for b in range(n):
                table[a, b] = layout.vector(gradient(anchor.params, b))
        return table

    stored = Stored(
        at_anchors(problem.gradient),
        torch.stack([layout.vector(anchor.params) for anchor in reference.anchors]),
        tuple(anchor.position for anchor in reference.anchors),
        like.new_zeros(layout.size, 0),
        like.new_zeros(n, 0, layout.size),
        at_anchors(problem.sample_gradient) if hessian == "rows" else None,
    )
    made = Moments(reference.sequence, Cost(), reference, problem, hessian, stored)
    if directions:
        basis, reach = stray_directions(made, directions, seed)
        middle = layout.vector(reference.nearest(len(reference.sequence) / 2).params)
        curved = like.new_empty(n, basis.shape[1], layout.size)
        for j, length in enumerate(reach.tolist()):
            for b in range(n):
                ahead, behind = (
                    layout.vector(problem.gradient(layout.tensors(middle + side * basis[:, j]), b))
                    for side in (length, -length)
                )
                curved[b, j] = (ahead - behind) / (2 * length)
        stored = Stored(stored.gradients, stored.places, stored.positions, basis, curved)
    made = Moments(reference.sequence, Cost(), reference, problem, hessian, stored)
    error = replay(made, seed)
    cost = Cost(gradients=problem.cost.gradients - before, bytes=need)
    return Moments(reference.sequence, cost, reference, problem, hessian, stored, error)


def replay(made: Moments, seed: int = 0) -> float:
    """Measure the error for the reference order, whose result is known, relative to differences between orders.

    The value is |u (estimated end of the reference order - its recorded end)| divided by the standard deviation of u
    (end) over some random orders (without the change of gradients, so that they cost nothing), where u is the held-out
    gradient at the recorded end: differences that do not affect the held-out loss do not count. Near 1, the error is as
    large as the differences between orders; the ranking is reliable if the value is small.

    Args:
        made: an estimate with stored gradients.
        seed: seed of the random orders.

    Returns:
        The ratio.

    """
    assert made.stored is not None
    layout = made._layout
    end = layout.vector(made.reference.end.params)
    u = layout.vector(made.problem.held_out_gradient(made.reference.end.params))
    plain = replace(made, stored=replace(made.stored, sampled=None))
    others, _ = plain._run(random_orders(made.sequence, _REPLAYED, seed))
    again, _ = made._run([made.sequence])
    error, spread = float(((again[0] - end) @ u).abs()), float(((others - end) @ u).std())
    return error / max(spread, 1e-30)


def stray_directions(made: Moments, k: int, seed: int) -> tuple[Float[Tensor, "p m"], Float[Tensor, " m"]]:
    """Find the directions in which orders deviate from the reference's path.

    These are the principal directions of the deviations of simulated random orders (without the change of gradients),
    at positions spread over the run.

    Args:
        made: an estimate with stored gradients.
        k: largest number of directions.
        seed: seed of the random orders.

    Returns:
        m <= k orthonormal directions, floating dtype [p, m], and the root mean square deviation along each, [m].

    Raises:
        Diverged: if the simulated runs of all orders diverge.

    """
    assert made.stored is not None
    steps = len(made.sequence)
    stored, rows = made.stored, []

    def keep(t: int, places: Tensor) -> None:
        if (t + 1) % max(1, steps // 8) == 0:
            rows.append(places - interpolated(stored.places, stored.positions, t + 1))

    made._run(random_orders(made.sequence, _SIMULATED, seed), keep)
    strayed = torch.cat(rows)
    strayed = strayed[strayed.isfinite().all(1)]
    if not len(strayed):
        raise Diverged("order: the simulated runs of all orders diverge; lower the learning rate of the reference run")
    values, vectors = torch.linalg.eigh((strayed @ strayed.T).double())
    kept = values.flip(0)[:k] > 1e-10 * values[-1]
    top = vectors.flip(1)[:, :k][:, kept].to(strayed.dtype)
    basis: Tensor = torch.linalg.qr(strayed.T @ top).Q
    return basis, (strayed @ basis).square().mean(0).sqrt()
