"""Replay in the span of the gradients of a few true runs, with a gradient that is linear in the displacement.

A few runs in spread-out orders (the reference, its reverse, and both rotated) give R gradients of every batch, each at
the parameters of its run, and nothing else is computed. Gradients of other orders are read off them by regression with
a kernel that is linear in the displacement x, in the metric of the preconditioner P:

    g_l(x) = sum_i w_i(l, x) g_i,   w = (K + noise)^-1 k(l, x),
    k((l, x), (l', x')) = 1 + [l = l'] + a (1 + s [l = l']) <x - mean, P^-1 (x' - mean)> / spread

That is Bayesian linear regression: every batch has a mean gradient, a Hessian that all batches share (a), and one of
its own (a s). Everything stays in the span of the R T gradients, so that an order is replayed in R T numbers per step:

    m <- beta m + (1 - beta) w,   x <- x - lr_t P m / c_t

The held-out loss is integrated from the ends of the runs, between whose gradients that of the held-out rows is
interpolated in the same way; the replayed ends of the same runs are the origin, so that errors that all orders share
cancel. No choice of (a, s) is best at every learning rate: the estimate is the mean over nine of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.estimators.expansion import expected_second_moment
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import check_linear, linearised
from datatools.order.estimators.question import Question, Settings
from datatools.order.estimators.surrogate import LIMIT_BYTES, Surrogate
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun

RUNS = 4
_SHARED, _OWN = (1.0, 3.0, 10.0), (0.03, 0.1, 0.3)  # a, and s: chosen on stories260k at two learning rates
_NOISE, _RIDGE = 0.01, 0.1
_STEPS = 256


@dataclass(frozen=True, eq=False)
class Span(Surrogate):
    """The estimate of `precompute`: inner products of N = R T gradients and of the places where they were taken.

    Attributes:
        labels: batch of each gradient, int64 [N].
        gram: <b_i, P b_j> of the gradients and the carried moment, float64 [N + 1, N + 1].
        along: <b_i, x_j> with the displacement at gradient j, float64 [N + 1, N].
        places: <x_i, P^-1 x_j>, float64 [N, N].
        slopes: <u_r, P b_i> with the held-out gradient at the end of run r, float64 [R, N + 1].
        losses: held-out loss at the end of each run, float64 [R].
        runs: the orders of the runs, int64 [R, T].
        beta: decay of the first moment.
        rates: learning rates by position.
        corrections: divisors of the first moment by position.

    """

    name: ClassVar[str] = "span"
    title: ClassVar[str] = "the run replayed in the span of the gradients of four true runs"
    once: ClassVar[str] = "four true runs, and the held-out gradient at their ends"
    each: ClassVar[str] = "T steps of 4 T numbers"
    source: ClassVar[str] = "own"
    limits: ClassVar[Mapping[str, float]] = {"spread": 1.0}
    """`spread` is the standard deviation of the nine models of an order's loss over that of orders."""
    keeps_gradients: ClassVar[bool] = True
    together: ClassVar[int] = 256

    labels: Int64[Tensor, " N"]
    gram: Float64[Tensor, "M M"]
    along: Float64[Tensor, "M N"]
    places: Float64[Tensor, "N N"]
    slopes: Float64[Tensor, "R M"]
    losses: Float64[Tensor, " R"]
    runs: Int64[Tensor, "R T"]
    beta: float
    rates: tuple[float, ...]
    corrections: tuple[float, ...]

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Span:
        """Call the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Count the runs, their held-out gradients and losses, and two vectors per gradient."""
        count = RUNS * question.steps
        return Cost(
            gradients=count + RUNS * question.held_out,
            forwards=RUNS * question.held_out,
            bytes=8 * (count + 2 * RUNS) * question.parameters,
        )

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Return True: a score depends on numbers of the span alone."""
        return True

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """Return True: only the first moment depends on the order."""
        return True

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Return nothing: it takes no setting."""
        return {}

    @classmethod
    def check(cls, question: Question) -> None:
        """Refuse a run of too many steps, besides rules whose moments are not linear."""
        super().check(question)
        if question.steps > _STEPS:
            raise UsageError(
                f"estimator span: {question.steps} steps, but its matrices have 4 T rows and columns; it takes at most "
                f"{_STEPS} steps. Use fewer batches or epochs, or pairwise"
            )

    def _scores(self, sequences: Tensor) -> Tensor:
        return self._models(sequences).mean(0)

    def _models(self, sequences: Tensor) -> Tensor:
        """Compute the loss of each order by each model, float64 [9, R]."""
        both = torch.cat([self.runs, sequences])
        made = []
        for shared, own in itertools.product(_SHARED, _OWN):
            ends = self._replayed(both, shared, own)
            made.append(self._losses(ends[len(self.runs) :], ends[: len(self.runs)]))
        return torch.stack(made)

    def _replayed(self, sequences: Tensor, shared: float, own: float) -> Tensor:
        """Replay orders; returns the end of each in coefficients of the gradients, float64 [R, N + 1]."""
        count = len(self.labels)
        middle, centre = self.places.mean(0), self.places.mean()
        inner = self.places - middle - middle[:, None] + centre
        spread = inner.diagonal().mean().clamp_min(1e-300)
        same = (self.labels[:, None] == self.labels).double()
        kernel = 1 + same + shared * (1 + own * same) * inner / spread
        weights = torch.linalg.inv(kernel + _NOISE * torch.eye(count, dtype=torch.float64))
        place = torch.zeros(len(sequences), count + 1, dtype=torch.float64)
        moment = torch.zeros_like(place)
        moment[:, -1] = 1
        for t in range(sequences.shape[1]):
            near = place @ self.along
            inner = near - near.mean(1, keepdim=True) - middle + centre
            same = (sequences[:, t, None] == self.labels).double()
            kernel = 1 + same + shared * (1 + own * same) * inner / spread
            moment = self.beta * moment
            moment[:, :-1] += (1 - self.beta) * (kernel @ weights)
            place = place - self.rates[t] / self.corrections[t] * moment
        return place

    def _losses(self, ends: Tensor, known: Tensor) -> Tensor:
        """Integrate the held-out loss from the replayed ends of the runs to those of the orders, float64 [R]."""
        count = len(known)
        inner = known @ self.gram @ known.T
        middle, centre = inner.mean(0), inner.mean()
        spread = (inner.diagonal() - 2 * middle + centre).mean().clamp_min(1e-300)
        there = 1 + (inner - middle - middle[:, None] + centre) / spread
        near = ends @ self.gram @ known.T
        here = 1 + (near - near.mean(1, keepdim=True) - middle + centre) / spread
        weights = here @ torch.linalg.inv(there + _RIDGE * torch.eye(count, dtype=torch.float64))
        total = torch.zeros(len(ends), dtype=torch.float64)
        for run in range(count):
            halfway = weights / 2
            halfway[:, run] += 0.5
            total += self.losses[run] + ((halfway @ self.slopes) * (ends - known[run])).sum(1)
        return total / count

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Return how much the models of this order's loss differ, over the difference between the true runs."""
        self.score(sequence)
        models = self._models(torch.tensor([list(sequence)]))[:, 0]
        return {"spread": float(models.std()) / max(float(self.losses.std()), 1e-30)}


def designs(sequence: Sequence[int]) -> list[list[int]]:
    """Spread every batch over the positions: the order, its reverse, and both rotated by half.

    Args:
        sequence: the reference order [T].

    Returns:
        Four orders.

    """
    base, half = list(sequence), len(sequence) // 2
    turned = base[half:] + base[:half]
    return [base, base[::-1], turned, turned[::-1]]


def precompute(reference: ReferenceRun, problem: Problem, *, limit_bytes: int = LIMIT_BYTES) -> Span:
    """Compute the estimate from a reference run.

    Cost: 4 T gradients, and the held-out gradient and loss at four ends.
    Memory: 8 T p numbers while it runs.

    Args:
        reference: the recorded run; it is trained again, for the gradients of its steps.
        problem: the batches and their loss.
        limit_bytes: largest size of stored gradients and places, in bytes.

    Returns:
        The estimate.

    Raises:
        UsageError: if the rule's moments are not linear, or the run has fewer than two steps.
        EnvironmentProblem: if gradients exceed `limit_bytes`.

    """
    check_linear(reference.recipe)
    steps, recipe, layout = len(reference.sequence), reference.recipe, Layout.of(reference.start.params)
    if steps < 2:
        raise UsageError("order: the estimator span needs a run of two steps or more")
    begin = layout.vector(reference.start.params)
    need = 2 * RUNS * steps * layout.size * begin.element_size()
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: span needs {RUNS * steps} gradients and places of {layout.size:,} numbers, {need / 2**30:.1f} "
            f"GiB, more than {limit_bytes / 2**30:.1f}; use adapters (LoRA), fewer batches, or pairwise"
        )
    before = (problem.cost.gradients, problem.cost.forwards)
    runs = designs(reference.sequence)
    grads, places = begin.new_empty(RUNS * steps, layout.size), begin.new_empty(RUNS * steps, layout.size)
    slopes, losses = begin.new_empty(RUNS, layout.size), []
    for r, run in enumerate(runs):
        params, states = reference.start.params, reference.start.states
        for t, batch in enumerate(run):
            raw = problem.gradient(params, batch)
            grads[r * steps + t] = layout.vector(raw) * recipe.clip_factor(raw)
            places[r * steps + t] = layout.vector(params) - begin
            params, states = recipe.step(params, states, raw, t)
        slopes[r] = layout.vector(problem.held_out_gradient(params))
        losses.append(problem.held_out_loss(params))
    labels = torch.tensor(runs).reshape(-1)
    filtered = linearised(reference, layout, 0, _second(reference, layout, grads))
    p = filtered.preconditioner.to(begin)
    basis = torch.cat([grads, filtered.carried.to(begin)[None]])
    return Span(
        reference.sequence,
        Cost(problem.cost.gradients - before[0], 0, problem.cost.forwards - before[1], need),
        labels,
        _products(basis * p, basis),
        _products(basis, places),
        _products(places / p, places),
        _products(slopes * p, basis),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(runs),
        filtered.beta,
        recipe.rates,
        tuple(filtered.correction(t) for t in range(steps)),
    )


def _products(a: Float[Tensor, "n p"], b: Float[Tensor, "m p"]) -> Tensor:
    return (a @ b.T).double().cpu()


def _second(reference: ReferenceRun, layout: Layout, grads: Tensor) -> Tensor | None:
    """Compute the second moment at the end of a run from the gradients of all runs."""
    steps = len(reference.sequence)
    one = ReferenceRun(tuple(range(steps)), reference.recipe, reference.anchors)
    found = [expected_second_moment(one, layout, grads[lo : lo + steps]) for lo in range(0, len(grads), steps)]
    known = [value for value in found if value is not None]
    return torch.stack(known).mean(0) if known else None
