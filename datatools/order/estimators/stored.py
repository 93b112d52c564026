"""Gradients that are stored at anchors, and steps of several orders at once on such gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.order.estimators.layout import Layout
from datatools.order.recipe import Recipe, States


@dataclass(frozen=True, eq=False)
class Stored:
    """Gradients of n batches at A anchors, and how they change along k directions.

    Attributes:
        gradients: floating dtype [A, n, p].
        places: parameters at the anchors, [A, p].
        positions: positions of the anchors [A].
        basis: the directions, orthonormal, [p, k].
        curved: change of each batch's gradient along each direction, [n, k, p].
        sampled: gradients of the samples at the anchors, [A, n, p].

    """

    gradients: Float[Tensor, "A n p"]
    places: Float[Tensor, "A p"]
    positions: tuple[int, ...]
    basis: Float[Tensor, "p k"]
    curved: Float[Tensor, "n k p"]
    sampled: Float[Tensor, "A n p"] | None = None

    def __call__(self, batch: int, here: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return the interpolated gradient [p] of a batch at step t, and its change from there to `here` [p]."""
        strayed = here - interpolated(self.places, self.positions, t)
        return (
            interpolated(self.gradients[:, batch], self.positions, t),
            (self.basis.T @ strayed) @ self.curved[batch],
        )


def interpolated(at_anchors: Float[Tensor, "A p"], positions: Sequence[int], t: float) -> Float[Tensor, " p"]:
    """Interpolate linearly between the two anchors around a position.

    Args:
        at_anchors: values at the anchors, floating dtype [A, p].
        positions: positions of the anchors [A], ascending.
        t: the position.

    Returns:
        [p].

    """
    right = next((i for i, position in enumerate(positions) if position >= t), len(positions) - 1)
    if positions[right] <= t or right == 0:
        return at_anchors[right]
    share = (t - positions[right - 1]) / (positions[right] - positions[right - 1])
    return torch.lerp(at_anchors[right - 1], at_anchors[right], share)


def stepped_together(
    recipe: Recipe,
    layout: Layout,
    places: Float[Tensor, "R p"],
    states: States,
    grads: Float[Tensor, "R p"],
    position: int,
) -> tuple[Float[Tensor, "R p"], States]:
    """Take one step (`Recipe.step`) of R runs at once.

    Args:
        recipe: the recipe of the run.
        layout: layout of its parameters.
        places: parameters of each run, floating dtype [R, p].
        states: name -> state of the rule, with a leading dimension R.
        grads: gradients of each run, floating dtype [R, p].
        position: 0-based position of the step.

    Returns:
        Parameters [R, p] and states after the step.

    """
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
