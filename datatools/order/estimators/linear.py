"""Rules whose second moment is frozen: their moments are a linear filter of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.estimators.layout import Layout
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun
from optim import AdamWRule, SGDRule


@dataclass(frozen=True)
class Linear:
    """A rule with frozen second moment, as a linear filter with a diagonal preconditioner.

    One step: m <- beta m + (1 - beta) g, theta <- theta - lr P m / (1 - beta^t) (without bias correction: P m).
    SGD with momentum mu is beta = mu, P = 1 / (1 - mu).
    """

    beta: float
    preconditioner: Tensor  # [p]
    carried: Tensor  # [p], the first moment before the first step
    steps: int | None  # taken before the first position; None: no bias correction

    def correction(self, position: int) -> float:
        """What m is divided by at a position."""
        return 1.0 if self.steps is None else 1.0 - self.beta ** (self.steps + position + 1)

    def filter(self, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """E [T, T + 1] and e [T + 1], float64: what a gradient at s, and the carried moment, have moved before step q.

        d_q = -P (sum_{s < q} E[s, q] g_s + e[q] m_0);  E[s, q] = sum_{t = s}^{q - 1} lr_t (1 - b) b^(t - s) / c_t. With
        one learning rate and no bias correction E[s, q] = lr (1 - b^(q - s)): the momentum kernel of spec B.3, and
        E[s, T] its tail.
        """
        n, b = len(rates), self.beta
        moved, carried = torch.zeros(n, n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)
        weights = torch.zeros(n, dtype=torch.float64)
        for t, rate in enumerate(rates):
            weights *= b
            weights[t] += 1 - b
            moved[:, t + 1] = moved[:, t] + rate * weights / self.correction(t)
            carried[t + 1] = carried[t] + rate * b ** (t + 1) / self.correction(t)
        return moved, carried


def check_linear(recipe: Recipe) -> None:
    """Raise UsageError unless the rule's moments are linear once its preconditioner is frozen, for all parameters."""
    rules = list(recipe.rules.values())
    rule, fields = rules[0], rules[0].describe()
    if any(other != rule for other in rules) or not isinstance(rule, AdamWRule | SGDRule):
        names = sorted({r.name for r in rules})
        raise UsageError(
            f"order: this estimator needs moments that are linear with a frozen preconditioner, which adamw and sgd "
            f"have, the same for every parameter; the reference was trained with {', '.join(names)}. Use the estimator "
            "'moments', which carries the state of any rule"
        )
    if isinstance(rule, SGDRule) and (fields.get("nesterov") or fields.get("dampening")):
        raise UsageError("order: sgd with nesterov or dampening is not linearised; use the estimator 'moments'")
    if fields.get("amsgrad"):
        raise UsageError("order: adamw with amsgrad is not linearised; use the estimator 'moments'")


def linearised(reference: ReferenceRun, layout: Layout, position: int, second_moment: Tensor | None) -> Linear:
    """The linear filter of the reference's rule, its second moment frozen.

    Args:
        reference: the recorded run.
        layout: of its parameters.
        position: the second moment is that of the anchor nearest to it.
        second_moment: float [p], bias-corrected, in place of the one in the anchor's state.

    Raises:
        UsageError: for rules whose moments are not linear; those of `own-moments` are exact for any rule.
    """
    check_linear(reference.recipe)
    rule = next(iter(reference.recipe.rules.values()))
    fields = rule.describe()
    factors = torch.cat(
        [torch.full((shape.numel(),), float(reference.recipe.factors[name])) for name, shape in layout.shapes.items()]
    )
    states = reference.start.states
    if isinstance(rule, SGDRule):
        mu, carried = float(fields["momentum"]), torch.zeros_like(layout.vector(reference.start.params))
        if mu and all("momentum_buffer" in state for state in states.values()):
            carried = layout.vector({n: s["momentum_buffer"] for n, s in states.items()}) * (1 - mu)
        return Linear(mu, factors.to(carried) / (1 - mu), carried, None)
    b1, b2 = fields["betas"]
    anchor = reference.nearest(position)
    if second_moment is None:
        steps = float(next(iter(anchor.states.values()))["step"])
        if steps == 0:
            raise UsageError("order: the second moment at step 0 is zero; anchor later, or warm up first")
        correct = 1 - b2**steps if fields["bias_correction"] else 1.0
        second_moment = layout.vector({n: s["exp_avg_sq"] for n, s in anchor.states.items()}) / correct
    taken = int(next(iter(states.values()))["step"])
    preconditioner = factors.to(second_moment) / ((second_moment + fields["eps_root"]).sqrt() + fields["eps"])
    carried = layout.vector({n: s["exp_avg"] for n, s in states.items()})
    return Linear(float(b1), preconditioner, carried, taken if fields["bias_correction"] else None)
