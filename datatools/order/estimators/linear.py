"""Rules with a frozen second moment: their first moment is a linear filter of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from datatools.errors import UsageError
from datatools.order.estimators.layout import Layout
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun
from optim import AdamWRule, SGDRule


@dataclass(frozen=True)
class Linear:
    """A rule with a frozen second moment, as a linear filter with a diagonal preconditioner.

    One step is m <- beta m + (1 - beta) g, theta <- theta - lr P m / (1 - beta^t) (without bias correction: P m). SGD
    with momentum mu has beta = mu and P = 1 / (1 - mu).

    Attributes:
        beta: decay of the first moment.
        preconditioner: P, floating dtype [p].
        carried: the first moment before the first step, floating dtype [p].
        steps: number of steps before the first position; None without bias correction.

    """

    beta: float
    preconditioner: Float[Tensor, " p"]
    carried: Float[Tensor, " p"]
    steps: int | None

    def correction(self, position: int) -> float:
        """Compute the divisor of m at a position.

        Args:
            position: 0-based position.

        Returns:
            1 - beta^t, or 1 without bias correction.

        """
        return 1.0 if self.steps is None else 1.0 - self.beta ** (self.steps + position + 1)

    def filter(self, rates: Sequence[float]) -> tuple[Float64[Tensor, "T end"], Float64[Tensor, " end"]]:
        """Compute how far a gradient at s, and the carried moment, have moved the parameters before step q.

        d_q = -P (sum_{s < q} E[s, q] g_s + e[q] m_0), where E[s, q] = sum_{t = s}^{q - 1} lr_t (1 - b) b^(t - s) / c_t.
        With a constant learning rate and no bias correction, E[s, q] = lr (1 - b^(q - s)): the momentum kernel of spec
        B.3; E[s, T] is its tail.

        Args:
            rates: T learning rates.

        Returns:
            E [T, T + 1] and e [T + 1], float64.

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
    """Check that the rule's moments are linear once its preconditioner is frozen, for all parameters.

    Args:
        recipe: the recipe of the run.

    Raises:
        UsageError: if they are not.

    Example:
        >>> from datatools.order.example import example_run
        >>> check_linear(example_run()[1].recipe)  # AdamW: no error

    """
    rules = list(recipe.rules.values())
    rule, fields = rules[0], rules[0].describe()
    if any(other != rule for other in rules) or not isinstance(rule, AdamWRule | SGDRule):
        names = sorted({r.name for r in rules})
        raise UsageError(
            f"order: this estimator needs moments that are linear with a frozen preconditioner (adamw or sgd, with the "
            f"same settings for every parameter), but the reference was trained with {', '.join(names)}. Use the "
            "estimator 'moments', which supports the state of any rule"
        )
    if isinstance(rule, SGDRule) and (fields.get("nesterov") or fields.get("dampening")):
        raise UsageError("order: sgd with nesterov or dampening is not supported here; use the estimator 'moments'")
    if fields.get("amsgrad"):
        raise UsageError("order: adamw with amsgrad is not supported here; use the estimator 'moments'")


def linearised(
    reference: ReferenceRun, layout: Layout, position: int, second_moment: Float[Tensor, " p"] | None
) -> Linear:
    """Build the linear filter of the reference's rule with a frozen second moment.

    Args:
        reference: the recorded run.
        layout: layout of its parameters.
        position: the second moment is taken from the anchor closest to it.
        second_moment: bias-corrected second moment, floating dtype [p], to use instead.

    Returns:
        The filter.

    Raises:
        UsageError: if the rule's moments are not linear; the estimator `own-moments` supports any rule.

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
            raise UsageError("order: the second moment at step 0 is zero; use a later anchor, or warm up first")
        correct = 1 - b2**steps if fields["bias_correction"] else 1.0
        second_moment = layout.vector({n: s["exp_avg_sq"] for n, s in anchor.states.items()}) / correct
    taken = int(next(iter(states.values()))["step"])
    preconditioner = factors.to(second_moment) / ((second_moment + fields["eps_root"]).sqrt() + fields["eps"])
    carried = layout.vector({n: s["exp_avg"] for n, s in states.items()})
    return Linear(float(b1), preconditioner, carried, taken if fields["bias_correction"] else None)
