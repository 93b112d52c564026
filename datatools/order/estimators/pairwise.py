"""Pairwise precedence: every order is scored by T + T^2 numbers (spec B.3).

    score = constant + sum_t F[t, l_t] + sum_{s < t} K[s, t] Q_t[l_s, l_t]

The second moment is frozen (P = 1 / (sqrt(v^) + eps)), and momentum is exact. With g_l and H_l of batch l, u the
held-out gradient at the reference's end, and E[s, q] the distance that a gradient at s has moved before step q
(`Linear.filter`):

    F[t, l] = -E[t, T] <u, P g_l>,   K[s, t] = E[s, t] E[t, T],   Q[i, j] = <u, P H_j P g_i> = <H_j P u, P g_i>

If g_l is clipped to c g_l, H_l is the derivative of that (`unclipped`). This takes one gradient and one Hessian-vector
product per batch and anchor. Swapping two adjacent batches at beta = 0, P = 1 changes the loss by
lr^2 <u, H_B g_A - H_A g_B>, the Lie bracket of the two updates (also arXiv 2606.24993).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from datatools.order.estimators.expansion import expansion, expected_second_moment, shared_way, unclipped, used_anchors
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import linearised
from datatools.order.estimators.question import Question, Settings
from datatools.order.estimators.surrogate import Surrogate, random_orders
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import ReferenceRun
from optim import AdamWRule

Second = Literal["expected", "anchor"]
_DRAWN = 256  # random orders whose scores determine the spread of orders
_CHUNK = 1 << 22  # numbers that are gathered at a time


@dataclass(frozen=True, eq=False)
class Pairwise(Surrogate):
    """The estimate of `precompute`: no model and no gradients, only T n + T^2 + segments n^2 numbers.

    Attributes:
        constant: the part of the score that all orders share.
        position: F, float64 [T, n].
        kernel: K, float64 [T, T], zero unless s < t.
        precedence: Q, float64 [segments, n, n]; Q[i, j] for i before j.
        segment: the segment of each position, int64 [T].
        fresh: share of the second moment at the end that is due to the run itself (0 for rules without one).
        replay: error of the expansion for the path of the reference order (`precompute`).

    """

    name: ClassVar[str] = "pairwise"
    title: ClassVar[str] = "a precedence matrix of the batches, with the kernel of the momentum"
    once: ClassVar[str] = "a gradient and a Hessian-vector product per batch and anchor"
    each: ClassVar[str] = "T^2 numbers"
    source: ClassVar[str] = "the Lie bracket of two updates, arXiv 2606.24993"
    limits: ClassVar[Mapping[str, float]] = {"second_order": 0.05, "replay": 0.2, "fresh": 0.7}
    """On a small Llama, rankings were no better than chance for `second_order` of 0.08 and more. `replay` has the limit
    of `moments`; beyond it, `pairwise` is only sometimes right. `fresh` is the share of the second moment that is
    due to the run itself: near 1, no frozen second moment describes its first steps.
    """
    together: ClassVar[int] = 256

    constant: float
    position: Float64[Tensor, "T n"]
    kernel: Float64[Tensor, "T T"]
    precedence: Float64[Tensor, "segments n n"]
    segment: Int64[Tensor, " T"]
    fresh: float = 0.0
    replay: float = 0.0

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Pairwise:
        """Call the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """Return the number of anchors, at most the recorded ones."""
        settings = question.settings
        return {"anchors": min(settings.pairwise_anchors, settings.anchors, question.steps + 1)}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Count a gradient and a product per batch and anchor, and two vectors per batch."""
        settings, n = question.settings, question.batches
        anchors = min(settings.pairwise_anchors, settings.anchors)
        gradients = anchors * n + question.held_out
        return Cost(gradients=gradients, hvps=anchors * n, bytes=8 * n * question.parameters)

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """Return True: a score is a sum of numbers."""
        return True

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """Return True: only the first moment depends on the order."""
        return True

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Add where and how products are computed."""
        settings = question.settings
        return super().depends_on(question) | {"anchors": settings.pairwise_anchors, "products": settings.products}

    def _scores(self, sequences: Tensor) -> Tensor:
        first, second = self._terms(sequences)
        return self.constant + first + second

    def _terms(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the sums over positions and over pairs, float64 [R] each."""
        steps = sequences.shape[1]
        first = self.position[torch.arange(steps), sequences].sum(1)
        before, after = torch.triu_indices(steps, steps, 1)
        kernel = self.kernel[before, after].float()
        n = self.precedence.shape[1]
        flat = self.precedence.float().reshape(-1)
        offset = self.segment[after] * (n * n)
        second = torch.empty(len(sequences), dtype=torch.float64)
        chunk = max(1, _CHUNK // max(1, len(before)))
        for lo in range(0, len(sequences), chunk):
            part = sequences[lo : lo + chunk]
            index = part[:, before].mul_(n).add_(part[:, after]).add_(offset)
            second[lo : lo + chunk] = (flat.take(index) @ kernel).double()
        return first, second

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Return replay, fresh, and |second-order term| / |first-order term|, both for this order's whole path."""
        self.scores([sequence])
        first, second = (abs(float(term)) for term in self._terms(torch.tensor([list(sequence)])))
        ratio = second / first if first else float("inf") if second else 0.0
        return {"second_order": ratio, "replay": self.replay, "fresh": self.fresh}

    def way(self, end: int, moved: Float64[Tensor, "T end"]) -> Float64[Tensor, ""]:
        """Compute <u, displacement due to the gradients of the reference order before step `end`>.

        Args:
            end: the step.
            moved: E of `Linear.filter`, float64 [T, T + 1].

        Returns:
            0-d, float64.

        """
        sequence, tail = torch.tensor(self.sequence[:end]), moved[:end, -1]
        slopes = self.position[torch.arange(end), sequence] / torch.where(tail > 0, tail, torch.inf)
        pairs = self.precedence[self.segment[:end], sequence[:, None], sequence]  # [s, t], the segment of t
        kernel = (moved[:end, :end] * moved[:end, end]).triu(1)
        return moved[:end, end] @ slopes + (kernel * pairs).sum()

    def matrix(self) -> Float64[Tensor, "n n"]:
        """Compute the cost [n, n] of having i before j instead of after it, at the mean kernel.

        It is used for a heat map and for the start of a search. A negative entry means that i should come first.
        """
        steps = len(self.sequence)
        mean = self.kernel.sum() / max(1, steps * (steps - 1) / 2)
        q = self.precedence.mean(0)
        drift = torch.zeros_like(q)
        if steps > 1:  # the slope of F in the position, for batches whose position matters by itself
            at = torch.arange(steps, dtype=torch.float64)
            at = (at - at.mean()) / (at - at.mean()).square().sum()
            slope = (self.position * at[:, None]).sum(0)
            drift = slope[None, :] - slope[:, None]
        return mean * (q - q.T) + drift


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    anchors: int | None = None,
    second_moment: Second = "expected",
) -> Pairwise:
    """Compute the estimate from a reference run.

    At each of the chosen anchors, gradients and products are computed. Between anchors F is interpolated, so that it
    includes the drift that all orders share, and Q is that of the closest anchor. Weight decay is omitted: to first
    order, it moves all orders alike. `replay` compares the expansion's path of the reference order along u with the
    recorded one at each of its anchors: the largest error, divided by the standard deviation of the scores of random
    orders.

    Cost: a gradient and a Hessian-vector product per batch and anchor.
    Memory: 2 n p numbers while it runs.

    Args:
        reference: the recorded run.
        problem: the batches and their loss.
        anchors: number of the reference's anchors to use, spread over the run; 1 is the middle one (spec B.3), None
            all.
        second_moment: v^ in P. "anchor": that of the state. "expected": that of the start mixed with the mean squared
            gradients of the batches, at the end, which is the same for all orders. Only AdamW has one.

    Returns:
        The estimate.

    Raises:
        UsageError: if the rule's moments are not linear, or `anchors` exceeds the recorded ones.

    """
    n = len(problem.batches)
    chosen = used_anchors(reference, anchors)
    start_cost = (problem.cost.gradients, problem.cost.hvps)
    layout = Layout.of(reference.start.params)
    u = layout.vector(problem.held_out_gradient(reference.end.params))
    begin = layout.vector(reference.start.params)

    first, products, offsets, carried_terms = [], [], [], []
    filtered = None
    for anchor in chosen:
        grads, curved = begin.new_empty(n, layout.size), begin.new_empty(n, layout.size)
        factors = []
        for b in range(n):
            raw = problem.gradient(anchor.params, b)
            factors.append(reference.recipe.clip_factor(raw))
            grads[b] = layout.vector(raw) * factors[b]
        if filtered is None or second_moment == "anchor":
            v = expected_second_moment(reference, layout, grads) if second_moment == "expected" else None
            filtered = linearised(reference, layout, anchor.position, v)
        p = filtered.preconditioner.to(begin)
        moved, pu = p * grads, p * u
        for b, factor in enumerate(factors):
            free = layout.tensors(unclipped(pu, grads[b], factor))
            curved[b] = layout.vector(problem.hvp(anchor.params, b, free)) * factor
        first.append((grads @ pu).double().cpu())
        products.append((moved @ curved.T).double().cpu())  # [i, j] = <P g_i, H_j P u>
        offsets.append((curved @ (begin - layout.vector(anchor.params))).double().cpu())
        carried_terms.append((curved @ (p * filtered.carried.to(p))).double().cpu())
    assert filtered is not None
    moved_by, carried_by = filtered.filter(reference.recipe.rates)
    position, kernel, segment = expansion(
        moved_by,
        carried_by,
        [anchor.position for anchor in chosen],
        torch.stack(first),
        torch.stack(products),
        torch.stack(offsets),
        torch.stack(carried_terms),
        reference.sequence,
    )
    base = Pairwise(reference.sequence, Cost(), 0.0, position, kernel, torch.stack(products), segment)
    shared = shared_way(reference, layout, u, filtered, carried_by)
    known = torch.stack([u @ (layout.vector(anchor.params) - begin) for anchor in reference.anchors[1:]]).double().cpu()
    ends = [anchor.position for anchor in reference.anchors[1:]]
    wrong = torch.stack([base.way(q, moved_by) + shared[q] for q in ends]) - known
    spread = base._scores(torch.tensor(random_orders(reference.sequence, _DRAWN, 0))).std()
    replay = float(wrong.abs().max() / spread.clamp_min(1e-30))
    constant = problem.held_out_loss(reference.end.params) - base.score(reference.sequence)
    cost = Cost(
        gradients=problem.cost.gradients - start_cost[0],
        hvps=problem.cost.hvps - start_cost[1],
        bytes=2 * n * layout.size * begin.element_size(),
    )
    fresh = 0.0
    if isinstance(next(iter(reference.recipe.rules.values())), AdamWRule):
        taken = float(next(iter(reference.start.states.values()))["step"])  # also without bias correction
        fresh = len(reference.sequence) / (len(reference.sequence) + taken)
    return Pairwise(reference.sequence, cost, constant, position, kernel, torch.stack(products), segment, fresh, replay)
