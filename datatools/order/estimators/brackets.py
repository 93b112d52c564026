"""Inner products of the Lie brackets between sources, from minibatches of each at the anchors of a run.

A rule enters through the direction V_A along which a source moves the weights, and the transposed derivative w_A of
that move along the held-out gradient u. With a frozen second moment AdamW and SGD have V = P g and w = P u, and their
momentum is exact. Any other rule is stepped through the run on the mean gradient of all sources, and differentiated:
its slopes are the derivatives of <u, displacement> in the gradient of each step, and w is their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.anchors import Anchor
from datatools.order.estimators.expansion import expected_second_moment, unclipped, used_anchors
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import Linear, check_linear, linearised
from datatools.order.problem import Problem
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun

_UNROLLED = 64  # most steps of a rule that are differentiated; earlier steps are like the first of them


@dataclass(frozen=True, eq=False)
class Brackets:
    """Inner products of N minibatches at A anchors.

    Attributes:
        owner: source number of each minibatch [N].
        sequence: source number of each step of the reference run [T].
        positions: positions of the anchors [A].
        first: <u, V_i>, float64 [A, N].
        products: <V_i, H_j w_j>, float64 [A, N, N].
        offsets: <H_j w_j, theta_0 - anchor>, float64 [A, N].
        carried_terms: <H_j w_j, V of the moment at the start>, float64 [A, N].
        moved: E of `Linear.filter`, float64 [T, T + 1].
        carried: e of `Linear.filter`, float64 [T + 1].
        slopes: -d<u, end> / d(gradient of step t) along each minibatch's gradient, float64 [A, T, N]; None for AdamW
            and SGD, for which it is E[t, T] <u, V_i>.

    """

    owner: list[int]
    sequence: list[int]
    positions: list[int]
    first: Float64[Tensor, "A N"]
    products: Float64[Tensor, "A N N"]
    offsets: Float64[Tensor, "A N"]
    carried_terms: Float64[Tensor, "A N"]
    moved: Float64[Tensor, "T end"]
    carried: Float64[Tensor, " end"]
    slopes: Float64[Tensor, "A T N"] | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Brackets:
        """Restore brackets from plain values.

        Args:
            saved: field -> value; tensors are nested lists.

        Returns:
            The brackets.

        """
        plain = ("owner", "sequence", "positions")
        values: dict[str, Any] = {
            f.name: value if f.name in plain or value is None else torch.tensor(value, dtype=torch.float64)
            for f in fields(cls)
            for value in [saved[f.name]]
        }
        return cls(**values)

    def position_effects(
        self, position: Float64[Tensor, "T n"], mean: Float64[Tensor, "n N"]
    ) -> Float64[Tensor, "T n"]:
        """Replace the first-order part of F (`expansion`) by the slopes of the rule, if there are any.

        Args:
            position: F, float64 [T, n].
            mean: weight of each minibatch in the mean of each source, float64 [n, N].

        Returns:
            float64 [T, n].

        """
        if self.slopes is None:
            return position
        at, spots = torch.arange(len(position), dtype=torch.float64), torch.tensor(self.positions, dtype=torch.float64)
        share = torch.zeros(len(at), len(spots), dtype=torch.float64)
        right = torch.searchsorted(spots, at).clamp(0, len(spots) - 1)
        left = (right - 1).clamp_min(0)
        part = ((at - spots[left]) / (spots[right] - spots[left]).clamp_min(1e-30)).clamp(0, 1)
        share[torch.arange(len(at)), left] += 1 - part
        share[torch.arange(len(at)), right] += part
        plain = self.moved[:, -1, None] * (share @ self.first)
        return position + (plain - torch.einsum("ta,atn->tn", share, self.slopes)) @ mean.T


def brackets(
    problem: Problem,
    reference: ReferenceRun,
    owner: Sequence[int],
    replicates: Sequence[int],
    labels: Sequence[int],
    anchors: int | None = None,
) -> Brackets:
    """Compute the inner products of minibatches of sources at the anchors of a reference run.

    Args:
        problem: the batches and their loss.
        reference: a recorded run, or only its start.
        owner: source number of each minibatch [N].
        replicates: batch number of each minibatch [N].
        labels: source number of each step of the run [T].
        anchors: number of anchors to use; 1 is the start, None all.

    Returns:
        The inner products.

    Raises:
        UsageError: if the steps of the rule do not depend on the size of gradients.

    """
    recipe, layout = reference.recipe, Layout.of(reference.start.params)
    chosen = used_anchors(reference, anchors) if anchors != 1 else [reference.start]
    linear = is_linear(recipe)
    if not linear:
        _check_derivative(recipe, reference.start)
    steps = [labels.count(source) for source in range(max(owner) + 1)]
    u = layout.vector(problem.held_out_gradient(reference.end.params))
    begin, count = layout.vector(reference.start.params), len(replicates)
    filtered: Linear | None = None
    first, products, offsets, carried_terms, slopes = [], [], [], [], []
    for anchor in chosen:
        grads, curved = begin.new_empty(count, layout.size), begin.new_empty(count, layout.size)
        factors = []
        for i, batch in enumerate(replicates):
            raw = problem.gradient(anchor.params, batch)
            factors.append(recipe.clip_factor(raw))
            grads[i] = layout.vector(raw) * factors[i]
        if linear:
            if filtered is None:
                filtered = linearised(
                    reference, layout, anchor.position, _second(reference, layout, grads, owner, steps)
                )
            along = filtered.preconditioner.to(begin) * grads
            answer = filtered.preconditioner.to(begin) * u
            start = filtered.preconditioner.to(begin) * filtered.carried.to(begin)
        else:
            shares = torch.tensor([steps[source] / owner.count(source) for source in owner]).to(grads)
            along, answer, slope = _of_rule(recipe, layout, anchor, grads, shares / shares.sum(), u)
            start = torch.zeros_like(u)
            slopes.append(slope)
        for i, batch in enumerate(replicates):
            free = layout.tensors(unclipped(answer, grads[i], factors[i]))
            curved[i] = layout.vector(problem.hvp(anchor.params, batch, free)) * factors[i]
        first.append((along @ u).double().cpu())
        products.append((along @ curved.T).double().cpu())
        offsets.append((curved @ (begin - layout.vector(anchor.params))).double().cpu())
        carried_terms.append((curved @ start).double().cpu())
    filtered = filtered or Linear(0.0, torch.ones(()), torch.zeros(()), None)
    moved, carried = filtered.filter(recipe.rates)
    return Brackets(
        list(owner), list(labels), [anchor.position for anchor in chosen], torch.stack(first), torch.stack(products),
        torch.stack(offsets), torch.stack(carried_terms), moved, carried if linear else torch.zeros_like(carried),
        torch.stack(slopes) if slopes else None,
    )  # fmt: skip


def is_linear(recipe: Recipe) -> bool:
    """Return whether the moments of the rule are linear once its second moment is frozen (`check_linear`).

    Args:
        recipe: the recipe of the run.

    Returns:
        Whether they are.

    """
    try:
        check_linear(recipe)
    except UsageError:
        return False
    return True


def _second(
    reference: ReferenceRun, layout: Layout, grads: Tensor, owner: Sequence[int], steps: Sequence[int]
) -> Tensor | None:
    """Compute the second moment at the end of a run in which each source has its steps."""
    mine = [[i for i, source in enumerate(owner) if source == number] for number in range(len(steps))]
    sequence = tuple(mine[source][t % len(mine[source])] for source, count in enumerate(steps) for t in range(count))
    return expected_second_moment(ReferenceRun(sequence, reference.recipe, reference.anchors), layout, grads)


def _check_derivative(recipe: Recipe, start: Anchor) -> None:
    """Refuse rules if no step of any depends on the size of gradients, from a random gradient of one parameter each."""
    generator = torch.Generator().manual_seed(0)
    for name in {rule: name for name, rule in recipe.rules.items()}.values():
        grad = torch.randn(start.params[name].shape, generator=generator).to(start.params[name])
        slopes = _derivatives(recipe, start, name, grad, grad)[-1]
        if bool(slopes.isfinite().all()) and float(slopes.abs().max()) > 0:
            return
    names = ", ".join(sorted({rule.name for rule in recipe.rules.values()}))
    raise UsageError(
        f"order: the steps of the rule {names} do not change with the size of gradients (their derivative is zero), so "
        "that all brackets between sources are zero; train with adamw, sgd or muon, take more --warmup-steps if the "
        "rule rectifies its first steps, or compare sources with the estimator 'groups'"
    )


def _of_rule(
    recipe: Recipe,
    layout: Layout,
    anchor: Anchor,
    grads: Float[Tensor, "N p"],
    shares: Float[Tensor, " N"],
    u: Float[Tensor, " p"],
) -> tuple[Float[Tensor, "N p"], Float[Tensor, " p"], Float64[Tensor, "T N"]]:
    """Compute V of each minibatch, w, and the slopes of each step from the rule itself."""
    mean, held = layout.tensors(shares @ grads), layout.tensors(u)
    each = [layout.tensors(grad) for grad in grads]
    steps = len(recipe.rates)
    slopes = torch.zeros(steps, len(grads), dtype=torch.float64)
    along, answers = [], []
    for name in layout.shapes:
        derivatives = _derivatives(recipe, anchor, name, mean[name], held[name])[1]
        mine = torch.stack([grad[name].reshape(-1) for grad in each])
        flat = derivatives.reshape(len(derivatives), -1)
        known = (flat @ mine.T).double().cpu()
        early = torch.tensor(recipe.rates[: steps - len(known)], dtype=torch.float64) / max(
            recipe.rates[-len(known)], 1e-30
        )
        slopes += torch.cat([early[:, None] * known[:1], known])
        answers.append(flat.sum(0) / sum(recipe.rates[-len(known) :]))
        moves = [_derivatives(recipe, anchor, name, grad[name], None)[0] for grad in each]
        along.append(torch.stack([move.reshape(-1) for move in moves]))
    return torch.cat(along, 1), torch.cat(answers), slopes


def _derivatives(
    recipe: Recipe, anchor: Anchor, name: str, gradient: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step one parameter on one gradient to the end of the run.

    Returns:
        The mean direction [*shape], and the derivatives of rate-weighted <u, directions> in the gradient of each of the
        last steps [steps, *shape].

    """
    rates = recipe.rates[-_UNROLLED:]
    leaf = gradient.detach().expand(len(rates), *gradient.shape).clone().requires_grad_(u is not None)
    state, moved = anchor.states[name], torch.zeros_like(gradient)
    with torch.set_grad_enabled(u is not None):
        for rate, grad in zip(rates, leaf, strict=True):
            direction, state = recipe.rules[name].update(grad, state, anchor.params[name])
            moved = moved + rate * recipe.factors[name] * direction.to(moved.dtype)
        mean = moved.detach() / max(sum(rates), 1e-30)
        if u is None or not moved.requires_grad:
            return mean, torch.zeros_like(leaf)
        (found,) = torch.autograd.grad((moved * u).sum(), leaf, allow_unused=True)
    return mean, torch.zeros_like(leaf) if found is None else found.nan_to_num(0.0, 0.0, 0.0)
