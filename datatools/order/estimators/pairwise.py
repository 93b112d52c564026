"""Pairwise precedence: every order scored by T + T^2 numbers (spec B.3).

    score = constant + sum_t F[t, l_t] + sum_{s < t} K[s, t] Q_t[l_s, l_t]

The second moment is frozen (P = 1 / (sqrt(v^) + eps)), momentum is exact. With g_l and H_l of batch l, u the held-out
gradient at the reference's end, and E[s, q] how far a gradient at s has moved before step q (`Linear.filter`):

    F[t, l] = -E[t, T] <u, P g_l>,   K[s, t] = E[s, t] E[t, T],   Q[i, j] = <u, P H_j P g_i> = <H_j P u, P g_i>

Where g_l is clipped to c g_l, H_l is the derivative of that (`unclipped`).
It takes one gradient and one Hessian-vector product per batch and anchor. Swapping two neighbours at beta = 0, P = 1
changes the loss by lr^2 <u, H_B g_A - H_A g_B>, the Lie bracket of the two updates (also arXiv 2606.24993).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import Linear, linearised
from datatools.order.estimators.question import Question, Settings
from datatools.order.estimators.surrogate import Surrogate, random_orders
from datatools.order.problem import Cost, Problem
from datatools.order.reference_run import Anchor, ReferenceRun
from optim import AdamWRule

Second = Literal["expected", "anchor"]
_DRAWN = 256  # random orders whose scores say how far apart orders are
_CHUNK = 1 << 22  # numbers gathered at a time


@dataclass(frozen=True, eq=False)
class Pairwise(Surrogate):
    """What `precompute` leaves: no model and no gradients, T n + T^2 + segments n^2 numbers.

    position: float64 [T, n], F; kernel: [T, T], K, zero unless s < t; precedence: [segments, n, n], Q[i, j] of i before
    j; segment: int64 [T], which of them holds at a position; constant: what all orders share; fresh: the share of the
    second moment at the end that the run itself made (0 for rules without one); replay: how wrong the expansion is
    about the way of the reference order (`precompute`).
    """

    name: ClassVar[str] = "pairwise"
    title: ClassVar[str] = "a precedence matrix of the batches, with the kernel of the momentum"
    once: ClassVar[str] = "a gradient and a Hessian-vector product per batch and anchor"
    each: ClassVar[str] = "T^2 numbers"
    source: ClassVar[str] = "the Lie bracket of two updates, arXiv 2606.24993"
    limits: ClassVar[Mapping[str, float]] = {"second_order": 0.05, "replay": 0.2, "fresh": 0.7}
    """On a small Llama, rankings were no better than chance from a `second_order` of 0.08 on. `replay` is limited as in
    `moments`; beyond its limit `pairwise` is at times right. `fresh` is the share of the second moment that the run
    itself makes: near 1, no frozen one describes its first steps.
    """
    together: ClassVar[int] = 256

    constant: float
    position: Tensor
    kernel: Tensor
    precedence: Tensor
    segment: Tensor
    fresh: float = 0.0
    replay: float = 0.0

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Pairwise:
        """See the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """As many of the recorded anchors as are asked for."""
        settings = question.settings
        return {"anchors": min(settings.pairwise_anchors, settings.anchors, question.steps + 1)}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """A gradient and a product per batch and anchor; two vectors per batch."""
        settings, n = question.settings, question.batches
        anchors = min(settings.pairwise_anchors, settings.anchors)
        gradients = anchors * n + question.held_out
        return Cost(gradients=gradients, hvps=anchors * n, bytes=8 * n * question.parameters)

    @classmethod
    def fast(cls, settings: Settings) -> bool:
        """A score is a sum of numbers."""
        return True

    @classmethod
    def freezes(cls, settings: Settings) -> bool:
        """Only the first moment is followed."""
        return True

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Also on where products are taken, and how."""
        settings = question.settings
        return super().depends_on(question) | {"anchors": settings.pairwise_anchors, "products": settings.products}

    def _scores(self, sequences: Tensor) -> Tensor:
        first, second = self._terms(sequences)
        return self.constant + first + second

    def _terms(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over positions and over pairs, float64 [R] each."""
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
        """|second-order term| / |first-order term|, both of this order's whole path; `replay`; and `fresh`."""
        self.scores([sequence])
        first, second = (abs(float(term)) for term in self._terms(torch.tensor([list(sequence)])))
        ratio = second / first if first else float("inf") if second else 0.0
        return {"second_order": ratio, "replay": self.replay, "fresh": self.fresh}

    def way(self, end: int, moved: Tensor) -> Tensor:
        """<u, what the gradients of the reference order have moved before step `end`>, 0-d. moved: `Linear.filter`."""
        sequence, tail = torch.tensor(self.sequence[:end]), moved[:end, -1]
        slopes = self.position[torch.arange(end), sequence] / torch.where(tail > 0, tail, torch.inf)
        pairs = self.precedence[self.segment[:end], sequence[:, None], sequence]  # [s, t], the segment of t
        kernel = (moved[:end, :end] * moved[:end, end]).triu(1)
        return moved[:end, end] @ slopes + (kernel * pairs).sum()

    def matrix(self) -> Tensor:
        """[n, n]: what it costs to have i somewhere before j rather than after, at the mean kernel; for a heat map and
        the start of a search. Negative: i should come first.
        """
        steps = len(self.sequence)
        mean = self.kernel.sum() / max(1, steps * (steps - 1) / 2)
        q = self.precedence.mean(0)
        drift = torch.zeros_like(q)
        if steps > 1:  # a batch whose place matters by itself pulls towards its end of the sequence
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
    """The precedence surrogate of a reference run.

    anchors: how many of the reference's anchors are used, spread over the run; 1 is the middle one (spec B.3), None is
    all of them. Gradients and products at each; between anchors F is interpolated, so that the drift which all
    orders share is in it, and Q is the nearest anchor's.
    replay: the expansion's way of the reference order along u to each of its anchors, against the recorded one: the
    largest error, over the standard deviation of the scores of random orders.
    second_moment: P's v^. "anchor": the state's. "expected": the start's, with the mean of the batches' squared
    gradients, at the end: the same for all orders. Only AdamW has one.
    Weight decay is left out: it moves all orders alike, to first order.
    Cost: a gradient and a Hessian-vector product per batch and anchor. Bytes: 2 n p numbers while it runs.
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
        taken = float(next(iter(reference.start.states.values()))["step"])  # also where nothing is bias-corrected
        fresh = len(reference.sequence) / (len(reference.sequence) + taken)
    return Pairwise(reference.sequence, cost, constant, position, kernel, torch.stack(products), segment, fresh, replay)


def unclipped(vector: Tensor, gradient: Tensor, factor: float) -> Tensor:
    """`vector` without its part along a gradient that is clipped (factor < 1), for the derivative of clipping:
    c g = clip g / |g| changes by c (I - g g^T / |g|^2) H d, and <v, that> = c <H (I - g g^T / |g|^2) v, d>.
    """
    if factor == 1.0:
        return vector
    return vector - (gradient @ vector) / (gradient @ gradient).clamp_min(1e-30) * gradient


def shared_way(reference: ReferenceRun, layout: Layout, u: Tensor, filtered: Linear, carried: Tensor) -> Tensor:
    """[T + 1]: what the carried moment and weight decay have moved along u before each step, in any order."""
    recipe, p = reference.recipe, filtered.preconditioner.to(u)
    decays = []
    for anchor in reference.anchors:
        decay = {n: theta * recipe.factors[n] * recipe.weight_decay[n] for n, theta in anchor.params.items()}
        decays.append(float(u @ layout.vector(decay)))
    there = np.interp(range(len(recipe.rates)), [anchor.position for anchor in reference.anchors], decays)
    decayed = torch.tensor([0.0, *(there * recipe.rates)], dtype=torch.float64).cumsum(0)
    return -carried * float(u @ (p * filtered.carried.to(u))) - decayed


def expansion(
    moved: Tensor,
    carried: Tensor,
    positions: Sequence[int],
    first: Tensor,
    products: Tensor,
    offsets: Tensor,
    carried_terms: Tensor,
    sequence: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """F [T, n], K [T, T] and the segment of each position [T], from inner products at A anchors.

    moved [T, T + 1], carried [T + 1]: `Linear.filter`. first [A, n]: <u, P g_l>. products [A, n, n]: <H_j P u, P g_i>.
    offsets [A, n]: <H_l P u, theta_0 - anchor>, carried_terms [A, n]: <H_l P u, P m_0>.

    One anchor: batch l's gradient at position t is g_l + H_l (theta_0 - anchor + everything moved before t).
    Several: g_l where the reference was at t, interpolated between anchors, + H_l (what this order moved before t, less
    what the reference did).
    """
    steps, tail = len(moved), moved[:, -1]
    kernel = (moved[:, :-1] * tail[None, :]).triu(1)
    at = torch.arange(steps, dtype=torch.float64)
    spots = torch.tensor(positions, dtype=torch.float64)
    segment = (at[:, None] - spots[None, :]).abs().argmin(1)
    if len(positions) == 1:
        gradient = first[0] + offsets[0] - carried[:-1, None] * carried_terms[0]
        return -tail[:, None] * gradient, kernel, segment
    right = torch.searchsorted(spots, at).clamp(1, len(positions) - 1)
    share = ((at - spots[right - 1]) / (spots[right] - spots[right - 1])).clamp(0, 1)
    gradient = torch.lerp(first[right - 1], first[right], share[:, None])
    reference = torch.tensor(list(sequence))
    drift = (moved[:, :-1].triu(1)[:, :, None] * products[segment][:, reference].transpose(0, 1)).sum(0)  # [T, n]
    return -tail[:, None] * (gradient + drift), kernel, segment


def expected_second_moment(reference: ReferenceRun, layout: Layout, grads: Tensor) -> Tensor | None:
    """[p], bias-corrected v^ at the end of a random order: what the start carries, and the mean squared gradient.

    At the end every batch has entered: before, a coordinate that only later batches move would look as if it had no
    second moment, and P g would explode where Adam's own step, which sees g^2 first, does not.
    None for rules without a second moment.
    """
    rule = next(iter(reference.recipe.rules.values()))
    if not isinstance(rule, AdamWRule):
        return None
    fields = rule.describe()
    b2, steps = fields["betas"][1], len(reference.sequence)
    counts = torch.bincount(torch.tensor(list(reference.sequence)), minlength=len(grads)).to(grads)
    mean = (grads.square() * counts[:, None]).sum(0) / counts.sum()
    states = reference.start.states
    taken = float(next(iter(states.values()))["step"])
    old = b2**steps
    mixed = old * layout.vector({n: s["exp_avg_sq"] for n, s in states.items()}) + (1 - old) * mean
    corrected: Tensor = mixed / (1 - b2 ** (taken + steps) if fields["bias_correction"] else 1.0)
    return corrected


def used_anchors(reference: ReferenceRun, anchors: int | None) -> list[Anchor]:
    """`anchors` of the reference's anchors, spread over the run: 1 is the one nearest to the middle, None all."""
    have = list(reference.anchors)
    if anchors is None:
        return have
    if not 1 <= anchors <= len(have):
        raise UsageError(f"order: {anchors} anchors of a reference run that recorded {len(have)}")
    if anchors == 1:
        return [reference.nearest(len(reference.sequence) / 2)]
    return [have[round(i * (len(have) - 1) / (anchors - 1))] for i in range(anchors)]
