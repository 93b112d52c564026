"""The published method, as a baseline: FUT and FUT++ (arXiv 2505.22042; spec part A).

    gamma_{t+1} = gamma_t - lr_t ( Gamma + grad Gamma d_t (+ 1/2 grad^2 Gamma [d_t, d_t]) ),   d_t = gamma_t - theta_t

with Gamma = Gamma(theta_t, B_l) the update of batch l at the reference's step t. Its moments are frozen: those of the
reference, mixed once with the gradient of B_l, and constant when differentiated. This is the only reading compatible
with a table over (t, l), and the reason why the method captures little of the effect of an order with Adam: the
contribution of a batch to later momentum remains that of the reference's batches.

The published compression is an option (`projection`): Gamma is stored as y = R Gamma, where R [k, p] are sparse random
signs (`projectors.SJLT`), and recovered as R^T y (spec A.5, reading 1). A projection preserves inner products, not
vectors: the relative error of a recovered term is sqrt((p - 1) / k), for Gaussian R sqrt((p + 1) / k): about 1 or more
whenever memory is saved, and the same holds for differences between orders. The error is measured, and reported by
`trust` as `sketch`.

Differs: derivatives of Gamma go through the rule itself (`torch.func.jvp`), so that any rule can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.anchors import Anchor
from datatools.order.estimators.layout import Layout
from datatools.order.estimators.question import Question
from datatools.order.estimators.surrogate import DRIFT_LIMIT, LIMIT_BYTES, Surrogate
from datatools.order.problem import Cost, Params, Problem
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun
from datatools.projectors import SJLT
from optim import UpdateRule

Derivative = Literal["none", "exact", "secant"]


@dataclass(frozen=True, eq=False)
class Table(Surrogate):
    """The estimate of `precompute`: `final(order)` returns parameters, `score` the held-out loss at these.

    Attributes:
        reference: the recorded run.
        problem: the batches and their loss.
        derivative: see `precompute`.
        order: see `precompute`.
        gradients: [T, n, p]; with a sketch, the projected terms R Gamma instead, float32 [T, n, k].
        sketch: the projection; None keeps whole gradients.
        sketch_error: root mean square of ||R^T R Gamma - Gamma|| / ||Gamma||.
        drifts: order -> its drift, for orders that were scored.

    """

    name: ClassVar[str] = "table"
    title: ClassVar[str] = "the published method (FUT, FUT++): updates with the reference's moments, a baseline"
    once: ClassVar[str] = "T gradients per batch"
    each: ClassVar[str] = "T steps of the rule"
    source: ClassVar[str] = "arXiv 2505.22042"
    limits: ClassVar[Mapping[str, float]] = {"drift": DRIFT_LIMIT, "frozen": 0.5, "sketch": 0.2}
    """`frozen` is the share of an update that depends on the reference's batches in any order. `sketch`, the relative
    error of projected terms and so of differences between orders, has the limit of `replay` in `moments`.
    """
    every_step: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    reference: ReferenceRun
    problem: Problem
    derivative: Derivative
    order: int
    gradients: Float[Tensor, "T n p"]
    sketch: SJLT | None = None
    sketch_error: float = 0.0
    drifts: dict[tuple[int, ...], float] = field(default_factory=dict)

    @classmethod
    def precompute(cls, reference: ReferenceRun, problem: Problem, **options: Any) -> Table:
        """Call the function `precompute`."""
        return precompute(reference, problem, **options)

    @classmethod
    def options(cls, question: Question) -> dict[str, Any]:
        """Return the projection, if one is set."""
        settings = question.settings
        return {"projection": settings.table_projection, "seed": settings.seed} if settings.table_projection else {}

    @classmethod
    def expected(cls, question: Question) -> Cost:
        """Count one gradient per step and batch, all of which are stored, whole or projected."""
        terms = question.steps * question.batches
        return Cost(gradients=terms, bytes=4 * terms * (question.settings.table_projection or question.parameters))

    @classmethod
    def depends_on(cls, question: Question) -> dict[str, Any]:
        """Return the projection, the only setting on which it depends."""
        return {"projection": question.settings.table_projection}

    def final(self, sequence: Sequence[int]) -> Params:
        """Estimate the parameters after the last step.

        Args:
            sequence: a permutation of the reference's sequence.

        Returns:
            Name -> [*shape].

        """
        self.reference.check(sequence)
        recipe = self.reference.recipe
        layout = Layout.of(self.reference.start.params)
        params = self.reference.start.params
        for t, batch in enumerate(sequence):
            here = self.reference.anchors[t]
            away = {name: p - here.params[name] for name, p in params.items()}
            product = self._product(t, batch, away)
            if self.sketch is None:
                grads = layout.tensors(self.gradients[t, batch])
                term = update(recipe, here, grads)
            else:
                grads = {} if product is None else self.problem.gradient(here.params, batch)
                term = recovered(self.sketch, self.gradients[t, batch], here.params)
            if product is not None:
                change = _change(recipe, here, grads, product, second=self.order == 2)
                term = {name: value + change[name] for name, value in term.items()}
            params = _moved(recipe, here, params, term, t)
        return params

    def _product(self, t: int, batch: int, away: Params) -> Params | None:
        """Compute H d, exactly or by the diagonal secant between the anchors t - 1 and t; None if there is none."""
        if self.derivative == "none" or not any(bool(d.any()) for d in away.values()):
            return None
        if self.derivative == "exact":
            return self.problem.hvp(self.reference.anchors[t].params, batch, away)
        if t == 0:
            return None
        layout = Layout.of(away)
        here, before = self.reference.anchors[t].params, self.reference.anchors[t - 1].params
        moved = layout.vector({name: p - before[name] for name, p in here.items()})
        change = self.gradients[t, batch] - self.gradients[t - 1, batch]
        diagonal = torch.where(moved == 0, torch.zeros_like(moved), change / moved)
        return layout.tensors(diagonal * layout.vector(away))

    def _scores(self, sequences: Tensor) -> Tensor:
        ends = [self._end(sequence) for sequence in sequences.tolist()]
        return torch.tensor([self.problem.held_out_loss(end) for end in ends], dtype=torch.float64)

    def _end(self, sequence: Sequence[int]) -> Params:
        """Compute `final`, and store its distance from the reference's end for `trust`."""
        final, end, start = self.final(sequence), self.reference.end.params, self.reference.start.params
        gone = sum(float((p - start[name]).square().sum()) for name, p in end.items())
        away = sum(float((p - end[name]).square().sum()) for name, p in final.items())
        self.drifts[tuple(map(int, sequence))] = (away / max(gone, 1e-30)) ** 0.5
        return final

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """Return drift, frozen and sketch.

        `drift` is the distance from the reference's end relative to the length of the reference's path; it is free for
        an order that was scored. `frozen` is the share of an update that is momentum, and depends on the
        reference's batches in any order. `sketch` is the relative error of the terms if they are projected.
        """
        key = tuple(map(int, sequence))
        if key not in self.drifts:
            self._end(key)
        found = {"drift": self.drifts[key], "frozen": max(map(_momentum, self.reference.recipe.rules.values()))}
        return found if self.sketch is None else found | {"sketch": self.sketch_error}


def _momentum(rule: UpdateRule) -> float:
    """Return the share of the first moment that is not this step's gradient; 0 for rules without one."""
    fields = rule.describe()
    return float(fields["betas"][0] if "betas" in fields else fields.get("momentum", 0.0))


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    derivative: Derivative = "none",
    order: int = 1,
    projection: int = 0,
    seed: int = 0,
    limit_bytes: int = LIMIT_BYTES,
) -> Table:
    """Compute the table of update terms, stored as the T n gradients that define them, or projected (spec A.2-A.6).

    Cost: T n gradients, as much as n retrainings.
    Memory: T n p numbers, or T n k float32 numbers if projected.

    Args:
        reference: the recorded run, with an anchor at every step.
        problem: the batches and their loss.
        derivative: of the loss's gradient. "none": zeroth order. "exact": Hessian-vector products, T more per scored
            order (an oracle). "secant": the published diagonal secant between consecutive anchors.
        order: 1 (FUT) or 2 (FUT++: the second derivative of Gamma in the gradient; the third derivative of the loss is
            omitted).
        projection: k, the dimension of projected terms; 0 stores whole gradients. Only Gamma is projected: with
            derivative "exact", a score takes T more gradients, and "secant" is refused, because its elementwise
            quotients are not a linear map of a sketch.
        seed: seed of the projection.
        limit_bytes: largest size of the table, in bytes.

    Returns:
        The estimate.

    Raises:
        UsageError: if an option is invalid, or the reference run lacks an anchor at a step.
        EnvironmentProblem: if the table exceeds `limit_bytes`.

    Source:
        FUT and FUT++, arXiv 2505.22042.

    """
    steps = len(reference.sequence)
    if [a.position for a in reference.anchors] != list(range(steps + 1)):
        raise UsageError(f"order: the table needs an anchor at every step of the reference; record {steps + 1} anchors")
    if derivative not in ("none", "exact", "secant") or order not in (1, 2):
        raise UsageError(
            f"order: table has no derivative {derivative!r} of order {order}; choose none, exact or secant, and 1 or 2"
        )
    if projection < 0 or (projection and derivative == "secant"):
        raise UsageError(
            f"order: cannot project a table with derivative {derivative!r} to {projection} numbers; use 0 or more with "
            "derivative 'none' or 'exact', because projections do not preserve the elementwise quotients of secants"
        )
    layout, n = Layout.of(reference.start.params), len(problem.batches)
    first = next(iter(reference.start.params.values()))
    sketch = SJLT(projection, seed) if projection else None
    width, dtype = (projection, torch.float32) if projection else (layout.size, first.dtype)
    need = steps * n * width * dtype.itemsize
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: a table of {steps} x {n} terms of {width:,} numbers needs "
            f"{need / 2**30:.1f} GiB, more than {limit_bytes / 2**30:.1f}; use pairwise, fewer batches, or adapters"
        )
    before = problem.cost.gradients
    table = torch.empty(steps, n, width, dtype=dtype, device=first.device)
    error = 0.0
    for t, here in enumerate(reference.anchors[:-1]):
        for batch in range(n):
            grads = problem.gradient(here.params, batch)
            if sketch is None:
                table[t, batch] = layout.vector(grads)
                continue
            term = update(reference.recipe, here, grads)
            table[t, batch] = sketch.project({name: value[None] for name, value in term.items()})[0]
            whole, again = layout.vector(term), layout.vector(recovered(sketch, table[t, batch], here.params))
            error += float((again - whole).square().sum() / whole.square().sum().clamp_min(1e-30)) / (steps * n)
    cost = type(problem.cost)(gradients=problem.cost.gradients - before, bytes=need)
    return Table(reference.sequence, cost, reference, problem, derivative, order, table, sketch, error**0.5)


def recovered(sketch: SJLT, projected: Float[Tensor, " k"], like: Params) -> Params:
    """Recover a term from its projection: R^T y.

    Args:
        sketch: the projection.
        projected: y, floating dtype [k].
        like: name -> parameter, for shapes and dtypes.

    Returns:
        Name -> [*shape].

    """
    return {name: sketch.transposed(projected[None], name, p.shape)[0].to(p.dtype) for name, p in like.items()}


def update(recipe: Recipe, here: Anchor, grads: Params) -> Params:
    """Compute Gamma: the update, without weight decay, of some gradients with the moments of an anchor.

    Args:
        recipe: the recipe of the run.
        here: the anchor.
        grads: name -> gradient [*shape].

    Returns:
        Name -> update [*shape].

    """
    scale = recipe.clip_factor(grads)
    return {name: gamma(grads[name] * scale) for name, gamma in _gammas(recipe, here).items()}


def _change(recipe: Recipe, here: Anchor, grads: Params, product: Params, *, second: bool) -> Params:
    """Compute the derivatives of Gamma along H d."""
    scale = recipe.clip_factor(grads)
    found: Params = {}
    for name, gamma in _gammas(recipe, here).items():
        slope, curved = taylor(gamma, grads[name] * scale, product[name] * scale)
        found[name] = slope + (0.5 * curved if second else 0)
    return found


def _gammas(recipe: Recipe, here: Anchor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return name -> function from a gradient to its direction, with frozen moments."""

    def gamma(g: Tensor, *, name: str) -> Tensor:
        return recipe.rules[name].update(g, here.states[name], here.params[name])[0]

    return {name: partial(gamma, name=name) for name in recipe.rules}


def _moved(recipe: Recipe, here: Anchor, params: Params, term: Params, position: int) -> Params:
    """Take a step along the term, with the weight decay of the order's own parameters."""
    moved: Params = {}
    for name, direction in term.items():
        decay = recipe.weight_decay[name]
        if decay:
            direction = direction + decay * recipe.rules[name].decay(direction, here.states[name], params[name])
        moved[name] = params[name] - recipe.rates[position] * recipe.factors[name] * direction
    return moved


def taylor(
    gamma: Callable[[Tensor], Tensor], grad: Float[Tensor, "*shape"], along: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Compute d Gamma [along] and d^2 Gamma [along, along] at a gradient; zero where they do not exist (v^ = 0).

    Args:
        gamma: gradient -> update, both [*shape].
        grad: floating dtype [*shape].
        along: floating dtype [*shape].

    Returns:
        First and second derivative [*shape].

    """

    def slope(g: Tensor) -> Tensor:
        along_it: Tensor = torch.func.jvp(gamma, (g,), (along,))[1]
        return along_it

    first, second = torch.func.jvp(slope, (grad,), (along,))[:2]
    return first.nan_to_num(0.0, 0.0, 0.0), second.nan_to_num(0.0, 0.0, 0.0)
