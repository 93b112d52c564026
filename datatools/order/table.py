"""The published method, as a baseline: FUT and FUT++ (arXiv 2505.22042; spec part A).

    gamma_{t+1} = gamma_t - lr_t ( Gamma + grad Gamma d_t (+ 1/2 grad^2 Gamma [d_t, d_t]) ),   d_t = gamma_t - theta_t

with Gamma = Gamma(theta_t, B_l) the update of batch l at the reference's step t. Its moments are frozen: those of the
reference, mixed once with the gradient of B_l, and constant when differentiated. That is the only reading compatible
with a table over (t, l), and why it sees little of an order's effect under Adam: a batch's part in later momentum
stays with the reference's batches.
Differs: derivatives of Gamma go through the rule itself (`torch.func.jvp`), so any rule will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from datatools.errors import EnvironmentProblem, UsageError
from datatools.order.reference import Anchor, Params, Problem, Recipe, ReferenceRun
from datatools.order.surrogate import Layout, Surrogate
from optim import State, UpdateRule

Derivative = Literal["none", "exact", "secant"]


@dataclass(frozen=True, eq=False)
class Table(Surrogate):
    """The estimate of `precompute`; `final(order)` gives its parameters, `score` the held-out loss there."""

    name: ClassVar[str] = "table"

    reference: ReferenceRun
    problem: Problem
    derivative: Derivative
    order: int
    gradients: Tensor  # [T, n, p]
    drifts: dict[tuple[int, ...], float] = field(default_factory=dict)
    """The largest drift of orders that were scored."""

    def final(self, sequence: Sequence[int]) -> Params:
        """The estimated parameters after the last step."""
        self.reference.check(sequence)
        recipe = self.reference.recipe
        layout = Layout.of(self.reference.start.params)
        params = self.reference.start.params
        for t, batch in enumerate(sequence):
            here = self.reference.anchors[t]
            away = {name: p - here.params[name] for name, p in params.items()}
            grads = layout.tensors(self.gradients[t, batch].to(next(iter(params.values())).dtype))
            product = self._product(t, batch, away)
            params = _frozen_step(recipe, here, params, grads, product, t, second=self.order == 2)
        return params

    def _product(self, t: int, batch: int, away: Params) -> Params | None:
        """H d, exactly or by the diagonal secant between the checkpoints t - 1 and t; None where there is none."""
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
        """`final`, whose distance from the reference's end is kept for `trust`."""
        final, end, start = self.final(sequence), self.reference.end.params, self.reference.start.params
        gone = sum(float((p - start[name]).square().sum()) for name, p in end.items())
        away = sum(float((p - end[name]).square().sum()) for name, p in final.items())
        self.drifts[tuple(map(int, sequence))] = (away / max(gone, 1e-30)) ** 0.5
        return final

    def trust(self, sequence: Sequence[int]) -> dict[str, float]:
        """The distance from the reference's end as a share of its way, free for an order that was scored; and `frozen`,
        the share of an update that is momentum, and stays with the reference's batches in any order.
        """
        key = tuple(map(int, sequence))
        if key not in self.drifts:
            self._end(key)
        return {"drift": self.drifts[key], "frozen": max(map(_momentum, self.reference.recipe.rules.values()))}


def _momentum(rule: UpdateRule) -> float:
    """The share of the first moment that is not this step's gradient; 0 for rules without one."""
    fields = rule.describe()
    return float(fields["betas"][0] if "betas" in fields else fields.get("momentum", 0.0))


def precompute(
    reference: ReferenceRun,
    problem: Problem,
    *,
    derivative: Derivative = "none",
    order: int = 1,
    limit_bytes: int = 8 << 30,
) -> Table:
    """The table of update terms, kept as the T n gradients that they are made of (spec A.2 to A.6).

    derivative: of the loss's gradient. "none": zeroth order. "exact": Hessian-vector products, T more a scored order
    (an oracle). "secant": the published diagonal secant between consecutive checkpoints.
    order: 1 (FUT) or 2 (FUT++: the second derivative of Gamma in the gradient; the third of the loss is left out).
    Cost: T n gradients, as much as n retrainings. Bytes: T n p numbers.
    Raises: UsageError without an anchor a step; EnvironmentProblem above `limit_bytes`.
    """
    steps = len(reference.sequence)
    if [a.position for a in reference.anchors] != list(range(steps + 1)):
        raise UsageError(f"order: the table needs an anchor at every step of the reference; record {steps + 1} of them")
    if derivative not in ("none", "exact", "secant") or order not in (1, 2):
        raise UsageError(f"order: table has no derivative {derivative!r} of order {order}; none, exact, secant; 1, 2")
    layout = Layout.of(reference.start.params)
    dtype = next(iter(reference.start.params.values())).dtype
    need = steps * len(problem.batches) * layout.size * dtype.itemsize
    if need > limit_bytes:
        raise EnvironmentProblem(
            f"order: a table of {steps} x {len(problem.batches)} gradients of {layout.size:,} numbers is "
            f"{need / 2**30:.1f} GiB, more than {limit_bytes / 2**30:.1f}; use pairwise, fewer batches, or adapters"
        )
    before = problem.cost.gradients
    gradients = torch.empty(steps, len(problem.batches), layout.size, dtype=dtype)
    for t in range(steps):
        for batch in range(len(problem.batches)):
            gradients[t, batch] = layout.vector(problem.gradient(reference.anchors[t].params, batch))
    cost = type(problem.cost)(gradients=problem.cost.gradients - before, bytes=need)
    return Table(reference.sequence, cost, reference, problem, derivative, order, gradients)


def _frozen_step(
    recipe: Recipe, here: Anchor, params: Params, grads: Params, product: Params | None, position: int, *, second: bool
) -> Params:
    """One step with the moments of `here`: Gamma at the gradient, and its derivatives along H d."""
    scale = recipe.clip_factor(grads)
    moved: Params = {}
    for name, rule in recipe.rules.items():
        state, at = here.states[name], here.params[name]

        def gamma(g: Tensor, rule: UpdateRule = rule, state: State = state, at: Tensor = at) -> Tensor:
            return rule.update(g, state, at)[0]

        grad = grads[name] * scale
        direction = gamma(grad)
        if product is not None:
            first, curved = taylor(gamma, grad, product[name] * scale)
            direction = direction + first + (0.5 * curved if second else 0)
        decay = recipe.weight_decay[name]
        if decay:
            direction = direction + decay * rule.decay(direction, state, params[name])
        moved[name] = params[name] - recipe.rates[position] * recipe.factors[name] * direction
    return moved


def taylor(gamma: Callable[[Tensor], Tensor], grad: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """d Gamma [along] and d^2 Gamma [along, along] at a gradient; zero where they do not exist (v^ = 0)."""

    def slope(g: Tensor) -> Tensor:
        along_it: Tensor = torch.func.jvp(gamma, (g,), (along,))[1]
        return along_it

    first, second = torch.func.jvp(slope, (grad,), (along,))[:2]
    return first.nan_to_num(0.0, 0.0, 0.0), second.nan_to_num(0.0, 0.0, 0.0)
