"""The terms of the pairwise expansion, from inner products at the anchors of a reference run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.anchors import Anchor
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.linear import Linear
from datatools.order.reference_run import ReferenceRun
from optim import AdamWRule


def unclipped(vector: Float[Tensor, " p"], gradient: Float[Tensor, " p"], factor: float) -> Float[Tensor, " p"]:
    """Remove from a vector its component along a gradient that is clipped (factor < 1), for the derivative of clipping.

    c g = clip g / |g| changes by c (I - g g^T / |g|^2) H d, and <v, that> = c <H (I - g g^T / |g|^2) v, d>.

    Args:
        vector: v, floating dtype [p].
        gradient: g, floating dtype [p].
        factor: c; 1 if the gradient is not clipped.

    Returns:
        [p].

    """
    if factor == 1.0:
        return vector
    return vector - (gradient @ vector) / (gradient @ gradient).clamp_min(1e-30) * gradient


def shared_way(
    reference: ReferenceRun, layout: Layout, u: Float[Tensor, " p"], filtered: Linear, carried: Float64[Tensor, " end"]
) -> Float64[Tensor, " end"]:
    """Compute the displacement along u before each step due to the carried moment and weight decay, in any order.

    Args:
        reference: the recorded run.
        layout: layout of its parameters.
        u: the held-out gradient, floating dtype [p].
        filtered: the filter of the rule.
        carried: e of `Linear.filter`, float64 [T + 1].

    Returns:
        float64 [T + 1].

    """
    recipe, p = reference.recipe, filtered.preconditioner.to(u)
    decays = []
    for anchor in reference.anchors:
        decay = {n: theta * recipe.factors[n] * recipe.weight_decay[n] for n, theta in anchor.params.items()}
        decays.append(float(u @ layout.vector(decay)))
    there = np.interp(range(len(recipe.rates)), [anchor.position for anchor in reference.anchors], decays)
    decayed = torch.tensor([0.0, *(there * recipe.rates)], dtype=torch.float64).cumsum(0)
    return -carried * float(u @ (p * filtered.carried.to(u))) - decayed


def expansion(
    moved: Float64[Tensor, "T end"],
    carried: Float64[Tensor, " end"],
    positions: Sequence[int],
    first: Float64[Tensor, "A n"],
    products: Float64[Tensor, "A n n"],
    offsets: Float64[Tensor, "A n"],
    carried_terms: Float64[Tensor, "A n"],
    sequence: Sequence[int],
) -> tuple[Float64[Tensor, "T n"], Float64[Tensor, "T T"], Int64[Tensor, " T"]]:
    """Compute F, K and the segment of each position from inner products at A anchors.

    With one anchor, batch l's gradient at position t is g_l + H_l (theta_0 - anchor + everything moved before t). With
    several, it is g_l at the reference's parameters at t, interpolated between anchors, + H_l (displacement of this
    order before t minus that of the reference).

    Args:
        moved: E of `Linear.filter`, float64 [T, T + 1].
        carried: e of `Linear.filter`, float64 [T + 1].
        positions: positions of the anchors.
        first: <u, P g_l>, float64 [A, n].
        products: <H_j P u, P g_i>, float64 [A, n, n].
        offsets: <H_l P u, theta_0 - anchor>, float64 [A, n].
        carried_terms: <H_l P u, P m_0>, float64 [A, n].
        sequence: the reference's sequence.

    Returns:
        F, float64 [T, n]; K, float64 [T, T]; segments, int64 [T].

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


def expected_second_moment(
    reference: ReferenceRun, layout: Layout, grads: Float[Tensor, "n p"]
) -> Float[Tensor, " p"] | None:
    """Compute the bias-corrected v^ at the end of a random order from that of the start and the mean squared gradient.

    At the end, every batch has contributed. Earlier, a coordinate that only later batches move would seem to have no
    second moment, and P g would explode where Adam's own step, which includes g^2 first, does not.

    Args:
        reference: the recorded run.
        layout: layout of its parameters.
        grads: gradients of the batches, floating dtype [n, p].

    Returns:
        [p], or None for rules without a second moment.

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
    """Choose anchors of a reference run, spread over it.

    Args:
        reference: the recorded run.
        anchors: their number: 1 chooses the one closest to the middle, None all.

    Returns:
        The anchors.

    Raises:
        UsageError: if the run has fewer anchors.

    """
    have = list(reference.anchors)
    if anchors is None:
        return have
    if not 1 <= anchors <= len(have):
        raise UsageError(f"order: {anchors} anchors of a reference run that recorded {len(have)}; use 1 to {len(have)}")
    if anchors == 1:
        return [reference.nearest(len(reference.sequence) / 2)]
    return [have[round(i * (len(have) - 1) / (anchors - 1))] for i in range(anchors)]
