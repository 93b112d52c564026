"""Own moments: step the rule itself, in the new order, on estimated gradients (spec B.1).

    g~_t = gradient of batch l_t where the new order is at position t, estimated
    state, gamma <- the rule's own step on g~_t, with weight decay and clipping as in training

Given the gradients nothing is approximate: the moments are the new order's own, for any rule. Gradients are estimated
in one of three ways:

- "exact": g + H d at the nearest anchor, d the distance from it. A gradient and a Hessian-vector product a step of
  every order: dearer than retraining it, an oracle; exact on quadratics with an anchor a step.
- "none": g there, without H d.
- "anchors": gradients of all batches at the anchors, taken once and interpolated in t, which follows the drift that all
  orders share; and where this order strays from that, their change along the k directions in which simulated orders
  stray most, by central differences over the distance to which those go (a secant: it sees the loss as far as orders
  reach, not its tangent). No further pass a score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.reference import Cost, Params, Problem, ReferenceRun, States
from datatools.order.surrogate import Layout, Surrogate

Gradients = Literal["anchors", "exact", "none"]
_SIMULATED = 12  # random orders whose paths give the directions


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

    def __call__(self, batch: int, here: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient [p] between the anchors, its change [p], distance from there [p]) of a batch at `here`, step t."""
        strayed = here - interpolated(self.places, self.positions, t)
        return (
            interpolated(self.gradients[:, batch], self.positions, t),
            (self.basis.T @ strayed) @ self.curved[batch],
            strayed,
        )


@dataclass(frozen=True, eq=False)
class Moments(Surrogate):
    """The estimate of `precompute`; `final(order)` gives its parameters, `score` the held-out loss there."""

    name: ClassVar[str] = "moments"

    reference: ReferenceRun
    problem: Problem
    hessian: Gradients
    stored: Stored | None = None

    def final(self, sequence: Sequence[int | None]) -> Params:
        """The estimated parameters after the last step; a step whose batch is None is left out."""
        return self._run(sequence)[0]

    def _run(self, sequence: Sequence[int | None]) -> tuple[Params, dict[str, float]]:
        params: Params = self.reference.start.params
        states: States = self.reference.start.states
        start, worst = params, {"curvature": 0.0, "drift": 0.0}
        for t, batch in enumerate(sequence):
            if batch is None:
                continue
            grads, curvature, strayed = self._gradient(t, batch, params)
            gone = _norm({name: p - start[name] for name, p in params.items()})
            worst["curvature"] = max(worst["curvature"], curvature)
            if t > len(sequence) // 4:  # before, nobody has gone far, and a share of little says little
                worst["drift"] = max(worst["drift"], strayed / max(gone, 1e-30))
            params, states = self.reference.recipe.step(params, states, grads, t)
        return params, worst

    def _gradient(self, t: int, batch: int, params: Params) -> tuple[Params, float, float]:
        """The estimated gradient, ||H d|| / ||g||, and ||d||."""
        if self.stored is not None:
            layout = Layout.of(params)
            known, change, away = self.stored(batch, layout.vector(params), t)
            ratio = float(change.norm() / known.norm().clamp_min(1e-30))
            return layout.tensors(known + change), ratio, float(away.norm())
        here = self.reference.nearest(t).params
        strayed = {name: p - here[name] for name, p in params.items()}
        grads, distance = self.problem.gradient(here, batch), _norm(strayed)
        if self.hessian == "none" or distance == 0:
            return grads, 0.0, distance
        product = self.problem.hvp(here, batch, strayed)
        ratio = _norm(product) / max(_norm(grads), 1e-30)
        return {name: g + product[name] for name, g in grads.items()}, ratio, distance

    def _scores(self, sequences: Tensor) -> Tensor:
        losses = [self.problem.held_out_loss(self.final(sequence)) for sequence in sequences.tolist()]
        return torch.tensor(losses, dtype=torch.float64)

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """||H d|| / ||g|| along the path, and the largest distance from the reference's path as a share of the way gone
        (after the first quarter of the steps).
        """
        self.reference.check(sequence)
        return self._run(sequence)[1]


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    hessian: Gradients = "anchors",
    directions: int = 0,
    limit_bytes: int = 8 << 30,
    seed: int = 0,
) -> Moments:
    """Own moments; `hessian` is one of the module's three, `directions` the k of "anchors".

    Cost of "anchors": A n gradients, and 2 k n for the directions. Bytes: (A + k) n p numbers.
    Raises: EnvironmentProblem above `limit_bytes`.
    """
    if hessian not in ("anchors", "exact", "none"):
        raise UsageError(f"order: moments has no gradients {hessian!r}; known: anchors, exact, none")
    if directions < 0:
        raise UsageError(f"order: moments along {directions} directions; 0 or more")
    if hessian != "anchors":
        return Moments(reference.sequence, Cost(), reference, problem, hessian)
    before, n = problem.cost.gradients, len(problem.batches)
    layout = Layout.of(reference.start.params)
    dtype = next(iter(reference.start.params.values())).dtype
    need = (len(reference.anchors) + directions) * n * layout.size * dtype.itemsize
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: gradients of {n} batches at {len(reference.anchors)} anchors, along {directions} directions, are "
            f"{need / 2**30:.1f} GiB, more than {limit_bytes / 2**30:.1f}; use fewer, adapters (LoRA), or pairwise"
        )
    stored = Stored(
        torch.stack(
            [
                torch.stack([layout.vector(problem.gradient(anchor.params, b)) for b in range(n)])
                for anchor in reference.anchors
            ]
        ),
        torch.stack([layout.vector(anchor.params) for anchor in reference.anchors]),
        tuple(anchor.position for anchor in reference.anchors),
        torch.zeros(layout.size, 0, dtype=dtype),
        torch.zeros(n, 0, layout.size, dtype=dtype),
    )
    made = Moments(reference.sequence, Cost(), reference, problem, hessian, stored)
    if directions:
        basis, reach = stray_directions(made, directions, seed)
        middle = layout.vector(reference.nearest(len(reference.sequence) / 2).params)
        curved = torch.empty(n, basis.shape[1], layout.size, dtype=dtype)
        for j, length in enumerate(reach.tolist()):
            for b in range(n):
                ahead, behind = (
                    layout.vector(problem.gradient(layout.tensors(middle + side * basis[:, j]), b))
                    for side in (length, -length)
                )
                curved[b, j] = (ahead - behind) / (2 * length)
        stored = Stored(stored.gradients, stored.places, stored.positions, basis, curved)
    cost = Cost(gradients=problem.cost.gradients - before, bytes=need)
    return Moments(reference.sequence, cost, reference, problem, hessian, stored)


def stray_directions(made: Moments, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Where orders stray from the reference's path: [p, <= k] orthonormal, and how far along each [<= k].

    Principal directions of the distances of simulated random orders (without change of gradients) at positions spread
    over the run; the reach of each is the root mean square along it.
    """
    assert made.stored is not None
    steps = len(made.sequence)
    layout = Layout.of(made.reference.start.params)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(_SIMULATED):
        drawn = torch.randperm(steps, generator=generator).tolist()
        params, states = made.reference.start.params, made.reference.start.states
        for t, place in enumerate(drawn):
            batch = made.sequence[place]
            grads, _, _ = made._gradient(t, batch, params)
            params, states = made.reference.recipe.step(params, states, grads, t)
            if (t + 1) % max(1, steps // 8) == 0:
                away = layout.vector(params) - interpolated(made.stored.places, made.stored.positions, t + 1)
                rows.append(away)
    strayed = torch.stack(rows)
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


def _norm(tensors: Params) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
