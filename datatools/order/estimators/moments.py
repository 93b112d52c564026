"""Own moments: step the rule itself, in the new order, on estimated gradients (spec B.1).

    g~_t = gradient of batch l_t where the new order is at position t, estimated
    state, gamma <- the rule's own step on g~_t, with weight decay and clipping as in training

Given the gradients nothing is approximate: the moments are the new order's own, for any rule. Gradients are estimated
in one of four ways:

- "exact": g + H d at the nearest anchor, d the distance from it. A gradient and a Hessian-vector product per
  step of every order: more expensive than retraining it, an oracle; exact on quadratics with an anchor at every step.
- "none": g there, without H d.
- "anchors": gradients of all batches at the anchors, taken once and interpolated in t, which follows the drift that all
  orders share; and where this order strays from that, their change along the k directions in which simulated orders
  stray most, by central differences over the distance to which those go (a secant: it sees the loss as far as orders
  reach, not its tangent). No further pass a score.
- "rows": the same gradients at the anchors; and where this order strays, the change of the gradient of a few rows of
  the batch (`Problem.samples`), s_l(here) - s_l(there): a control variate, right to all orders of the distance where
  the rows stand for the batch. A small gradient per step of every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.question import Question
from datatools.order.estimators.surrogate import CURVATURE_LIMIT, DRIFT_LIMIT, LIMIT_BYTES, Surrogate, random_orders
from datatools.order.problem import Cost, Diverged, Params, Problem
from datatools.order.recipe import Recipe, States
from datatools.order.reference_run import ReferenceRun

Gradients = Literal["anchors", "rows", "exact", "none"]
_SIMULATED = 12  # random orders whose paths give the directions
_REPLAYED = 8  # random orders that say how far apart orders end
_TOGETHER = 1 << 24  # parameters of all orders that are stepped at a time


@dataclass(frozen=True, eq=False)
class Stored:
    """Gradients at A anchors, [A, n, p], and where these are, [A, p], at which positions; and along `basis` [p, k],
    orthonormal, how each batch's gradient changes: `curved` [n, k, p].
    """

    gradients: Tensor
    places: Tensor
    positions: tuple[int, ...]
    basis: Tensor
    curved: Tensor
    sampled: Tensor | None = None  # [A, n, p], of the samples

    def __call__(self, batch: int, here: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """(gradient [p] between the anchors, its change from there [p]) of a batch at `here`, step t."""
        strayed = here - interpolated(self.places, self.positions, t)
        return (
            interpolated(self.gradients[:, batch], self.positions, t),
            (self.basis.T @ strayed) @ self.curved[batch],
        )


@dataclass(frozen=True, eq=False)
class Moments(Surrogate):
    """The estimate of `precompute`; `final(order)` gives its parameters, `score` the held-out loss there.

    replay: see `replay`; 0 where the reference order comes out by construction ("exact" and "none").
    """

    name: ClassVar[str] = "moments"
    title: ClassVar[str] = "the order's own moments, stepped by the rule on stored gradients"
    once: ClassVar[str] = "a gradient per batch and anchor"
    each: ClassVar[str] = "T steps of the rule"
    source: ClassVar[str] = "own"
    limits: ClassVar[Mapping[str, float]] = {"curvature": CURVATURE_LIMIT, "drift": DRIFT_LIMIT, "replay": 0.2}
    """`replay` is measured, along the held-out gradient: the error about the reference order, whose truth is known,
    over what tells orders apart (the function `replay`). Its limit is where rankings of a small Llama cease to hold
    (`python -m tests.benchmarks.order --rates 1e-4,3e-4,1e-3,3e-3`).
    """
    keeps_gradients: ClassVar[bool] = True

    reference: ReferenceRun
    problem: Problem
    hessian: Gradients
    stored: Stored | None = None
    replay: float = 0.0
    paths: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)
    """The indicators of orders that were scored."""

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Moments:
        """See the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """A gradient per batch and anchor, which are kept."""
        kept = question.settings.anchors * question.batches
        return Cost(gradients=kept + question.held_out, bytes=4 * kept * question.parameters)

    def final(self, sequence: Sequence[int | None]) -> Params:
        """The estimated parameters after the last step; a step whose batch is None is left out."""
        return self._layout.tensors(self._run([sequence])[0][0])

    @property
    def _layout(self) -> Layout:
        return Layout.of(self.reference.start.params)

    def _run(
        self, sequences: Sequence[Sequence[int | None]], observe: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The ends [R, p] of R orders that are stepped together, and the indicators of each path.

        A step that is None in all of them is left out. observe: called after each step with (position, places [R, p]).
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
        """`_gradient`, nan from where a run has diverged on: the other orders' runs go on."""
        try:
            return self._gradient(t, batch, place)
        except Diverged:
            return torch.full_like(place, math.nan), math.nan

    def _gradient(self, t: int, batch: int, place: Tensor) -> tuple[Tensor, float]:
        """The estimated gradient [p] at a place [p], and ||H d|| / ||g||."""
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
        """`replay`; the distance from the reference's end as a share of its way; and, where the change of gradients is
        linear, ||H d|| / ||g|| along the path. Free for an order that was scored.
        """
        self.reference.check(sequence)
        key = tuple(map(int, sequence))
        if key not in self.paths:
            self.paths[key] = self._run([key])[1][0]
        path = {"replay": self.replay} | self.paths[key]
        return path if self.hessian != "rows" else {k: v for k, v in path.items() if k != "curvature"}


def stepped_together(
    recipe: Recipe, layout: Layout, places: Tensor, states: States, grads: Tensor, position: int
) -> tuple[Tensor, States]:
    """`Recipe.step` of R runs at once: places and grads [R, p], states with R in front of each shape."""
    if recipe.clip is not None:
        norms = grads.double().norm(dim=1, keepdim=True)
        grads = grads * (recipe.clip / (norms + 1e-6)).clamp(max=1.0).to(grads.dtype)
    sizes = [shape.numel() for shape in layout.shapes.values()]
    moved: list[Tensor] = []
    new_states: States = {}
    with torch.no_grad():
        for (name, shape), place, grad in zip(
            layout.shapes.items(), torch.split(places, sizes, 1), torch.split(grads, sizes, 1), strict=True
        ):
            lr, decay = recipe.rates[position] * recipe.factors[name], recipe.weight_decay[name] or None
            step = partial(recipe.rules[name].stepped, lr=lr, weight_decay=decay)
            new, new_states[name] = torch.vmap(step, randomness="different")(
                place.reshape(-1, *shape), grad.reshape(-1, *shape), states[name]
            )
            moved.append(new.reshape(len(places), -1).to(places.dtype))
    return torch.cat(moved, 1), new_states


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    hessian: Gradients = "anchors",
    directions: int = 0,
    limit_bytes: int = LIMIT_BYTES,
    seed: int = 0,
) -> Moments:
    """Own moments; `hessian` is one of the module's four, `directions` the k of "anchors".

    Cost of "anchors": A n gradients, and 2 k n for the directions. Bytes: (A + k) n p numbers. Of "rows": A n gradients
    of batches and of samples, and T of samples for `replay` and for a score. Bytes: 2 A n p numbers. Of both: the
    held-out gradient, for `replay`.

    Raises:
        EnvironmentProblem: above `limit_bytes`.
    """
    if hessian not in ("anchors", "rows", "exact", "none"):
        raise UsageError(f"order: moments has no gradients {hessian!r}; known: anchors, rows, exact, none")
    if directions < 0 or (directions and hessian != "anchors"):
        raise UsageError(f"order: moments along {directions} directions; 0 or more, of gradients at anchors")
    if hessian in ("exact", "none"):
        return Moments(reference.sequence, Cost(), reference, problem, hessian)
    before, n = problem.cost.gradients, len(problem.batches)
    layout = Layout.of(reference.start.params)
    like = next(iter(reference.start.params.values()))
    tables = len(reference.anchors) * (2 if hessian == "rows" else 1) + directions
    need = tables * n * layout.size * like.element_size()
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: gradients of {n} batches at {len(reference.anchors)} anchors, along {directions} directions, are "
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
    """How wrong the estimate is about the one order whose truth is known, in the unit that matters.

    |u (estimated end of the reference order - its recorded end)| over the standard deviation of u (end) of a few random
    orders (without change of gradients, so that they cost none), u the held-out gradient at the recorded end: what does
    not move the held-out loss does not count. Near 1 the error is as large as what tells orders apart; the ranking
    holds where it is small.
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


def stray_directions(made: Moments, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Where orders stray from the reference's path: [p, <= k] orthonormal, and how far along each [<= k].

    Principal directions of the distances of simulated random orders (without change of gradients) at positions spread
    over the run; the reach of each is the root mean square along it.
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
        raise Diverged("order: the simulated runs of every order diverge; lower the learning rate of the reference run")
    values, vectors = torch.linalg.eigh((strayed @ strayed.T).double())
    kept = values.flip(0)[:k] > 1e-10 * values[-1]
    top = vectors.flip(1)[:, :k][:, kept].to(strayed.dtype)
    basis: Tensor = torch.linalg.qr(strayed.T @ top).Q
    return basis, (strayed @ basis).square().mean(0).sqrt()


def interpolated(at_anchors: Tensor, positions: Sequence[int], t: float) -> Tensor:
    """[anchors, p] -> [p] at position t, linearly between the two anchors around it."""
    right = next((i for i, position in enumerate(positions) if position >= t), len(positions) - 1)
    if positions[right] <= t or right == 0:
        return at_anchors[right]
    share = (t - positions[right - 1]) / (positions[right] - positions[right - 1])
    return torch.lerp(at_anchors[right - 1], at_anchors[right], share)
