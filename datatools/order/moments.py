"""Own moments: step the rule itself, in the new order, on estimated gradients.

    g~_t = gradient of batch l_t near where the reference was at position t      (three ways, below)
    state, gamma <- the rule's own step on g~_t, with weight decay and clipping as in training

The new order's moments are exact given the gradients, for any rule; nothing of the optimizer is linearised (spec B.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.reference import Params, Problem, ReferenceRun
from datatools.order.surrogate import Layout, Surrogate

Gradients = Literal["anchors", "exact", "none"]


@dataclass(frozen=True, eq=False)
class Moments(Surrogate):
    """The estimate of `precompute`; `final(order)` gives its parameters, `score` the held-out loss there.

    Cost of a score: T steps of the rule and one evaluation, and with hessian="exact" T Hessian-vector products.
    """

    name: ClassVar[str] = "moments"

    reference: ReferenceRun
    problem: Problem
    hessian: Gradients
    gradients: Tensor | None = None  # [anchors, n, p]
    positions: tuple[int, ...] = ()

    def final(self, sequence: Sequence[int | None]) -> Params:
        """The estimated parameters after the last step; a step whose batch is None is left out."""
        return self._run(sequence)[0]

    def _run(self, sequence: Sequence[int | None]) -> tuple[Params, dict[str, float]]:
        run, recipe = self.reference, self.reference.recipe
        params, states = run.start.params, run.start.states
        worst = {"curvature": 0.0, "drift": 0.0}
        for t, batch in enumerate(sequence):
            if batch is None:
                continue
            here = run.nearest(t)
            away = {name: p - here.params[name] for name, p in params.items()}
            grads = self._gradient(t, batch, away, worst)
            gone = _norm({name: p - run.start.params[name] for name, p in here.params.items()})
            if gone > 0 and here.position == t:
                worst["drift"] = max(worst["drift"], _norm(away) / gone)
            params, states = recipe.step(params, states, grads, t)
        return params, worst

    def _gradient(self, t: int, batch: int, away: Params, worst: dict[str, float]) -> Params:
        if self.gradients is not None:
            return Layout.of(away).tensors(interpolated(self.gradients[:, batch], self.positions, t))
        here = self.reference.nearest(t).params
        grads = self.problem.gradient(here, batch)
        if self.hessian == "none" or not any(bool(d.any()) for d in away.values()):
            return grads
        change = self.problem.hvp(here, batch, away)
        worst["curvature"] = max(worst["curvature"], _norm(change) / max(_norm(grads), 1e-30))
        return {name: g + change[name] for name, g in grads.items()}

    def _scores(self, sequences: Tensor) -> Tensor:
        losses = [self.problem.held_out_loss(self.final(sequence)) for sequence in sequences.tolist()]
        return torch.tensor(losses, dtype=torch.float64)

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """||H d|| / ||g|| along the path (hessian="exact"), and the largest distance from the reference's anchors as a
        share of the way that the reference had gone there.
        """
        self.reference.check(sequence)
        indicators = self._run(sequence)[1]
        return indicators if self.hessian == "exact" else {"drift": indicators["drift"]}


def precompute(
    reference: ReferenceRun, problem: Problem, *, hessian: Gradients = "anchors", limit_bytes: int = 8 << 30
) -> Moments:
    """Own moments. hessian says what the gradient of batch l at position t is:

    - "exact": g + H d at the nearest anchor (with an anchor a step: at the reference's own checkpoint), d the distance
      from it. Exact on quadratics, any order. A gradient and a Hessian-vector product a step of every order: dearer
      than retraining it, an oracle.
    - "none": g there, without H d.
    - "anchors": gradients of all batches at every anchor, computed once and interpolated in t: what the drift shared by
      all orders does to them, and no further pass per order.

    Bytes: "anchors" keeps anchors x n x p float32 numbers.
    Raises: EnvironmentProblem above `limit_bytes`.
    """
    if hessian not in ("anchors", "exact", "none"):
        raise UsageError(f"order: moments has no gradients {hessian!r}; known: anchors, exact, none")
    before = problem.cost.gradients
    if hessian != "anchors":
        cost = type(problem.cost)(bytes=0)
        return Moments(reference.sequence, cost, reference, problem, hessian)
    gradients = anchor_gradients(reference, problem, limit_bytes=limit_bytes)
    cost = type(problem.cost)(gradients=problem.cost.gradients - before, bytes=gradients.numel() * 4)
    positions = tuple(anchor.position for anchor in reference.anchors)
    return Moments(reference.sequence, cost, reference, problem, hessian, gradients, positions)


def anchor_gradients(reference: ReferenceRun, problem: Problem, *, limit_bytes: int = 8 << 30) -> Tensor:
    """[anchors, n, p] float32: the gradient of every batch at every anchor."""
    layout = Layout.of(reference.start.params)
    need = len(reference.anchors) * len(problem.batches) * layout.size * 4
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: {len(reference.anchors)} anchors x {len(problem.batches)} batches x {layout.size:,} parameters "
            f"are {need / 2**30:.1f} GiB, more than {limit_bytes / 2**30:.1f}; use fewer anchors, adapters (LoRA), or "
            "pairwise"
        )
    batches = range(len(problem.batches))
    return torch.stack(
        [
            torch.stack([layout.vector(problem.gradient(anchor.params, b), torch.float32) for b in batches])
            for anchor in reference.anchors
        ]
    )


def interpolated(at_anchors: Tensor, positions: Sequence[int], t: float) -> Tensor:
    """[anchors, p] -> [p] at position t, linearly between the two anchors around it."""
    right = next((i for i, position in enumerate(positions) if position >= t), len(positions) - 1)
    if positions[right] <= t or right == 0:
        return at_anchors[right]
    share = (t - positions[right - 1]) / (positions[right] - positions[right - 1])
    return torch.lerp(at_anchors[right - 1], at_anchors[right], share)


def _norm(tensors: Params) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
