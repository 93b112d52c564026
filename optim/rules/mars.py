"""MARS: AdamW or Lion on gradients whose variance is reduced with the previous gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_choice, check_non_negative, checked_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule

FORMS = ("adamw", "lion")


@dataclass(frozen=True, kw_only=True)
class MARSRule(UpdateRule):
    """MARS: AdamW or Lion on gradients whose variance is reduced with the previous gradients.

        c = clip(g + gamma b1 / (1 - b1) (g - g_last)),  m <- b1 m + (1 - b1) c,  v <- b2 v + (1 - b2) c^2

    clip(c) scales c to a norm of at most 1 over the whole tensor. The direction is m / (1 - b1^t) / (sqrt(v / (1 -
    b2^t)) + eps) in the form "adamw", and sign(m) in the form "lion". At the first step g_last is 0.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        gamma: The weight of the difference between gradients.
        form: "adamw" or "lion".
        eps: Added to the denominator.

    Shapes:
        Any. Not elementwise, because of the norm over the tensor.

    State:
        12 bytes per parameter (two float32 moments and the last gradient; 8 in the form "lion") and a step count.

    Source:
        Yuan et al. 2024, arXiv 2411.10438; AGI-Arena/MARS, its "approx" versions mars-adamw and mars-lion.

    Differs:
        The published code steps vectors by AdamW unless `optimize_1d` is set; here the rule steps every parameter that
        it is given. The third form of the published code, mars-shampoo, is Muon on c, and does not exist here.
    """

    name: ClassVar[str] = "mars"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.95, 0.99)
    gamma: float = 0.025
    form: str = "adamw"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("MARSRule", self.betas))
        check_non_negative("MARSRule", gamma=self.gamma, eps=self.eps)
        check_choice("MARSRule", FORMS, form=self.form)

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero last gradient and a zero step count."""
        keys = ("exp_avg", "last_grad", "exp_avg_sq") if self.form == "adamw" else ("exp_avg", "last_grad")
        return {"step": zero_step()} | {key: zero_moment(param) for key in keys}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        c = g + self.gamma * b1 / (1 - b1) * (g - state["last_grad"])
        norm = c.square().sum().sqrt()
        c = torch.where(norm > 1, c / norm, c)
        m = state["exp_avg"].lerp(c, 1 - b1)
        new = {"step": t, "exp_avg": m, "last_grad": g.clone()}
        if self.form == "lion":
            return m.sign(), new
        v = new["exp_avg_sq"] = (b2 * state["exp_avg_sq"]).addcmul(c, c, value=1 - b2)
        return (m / correction(b1, t) / ((v / correction(b2, t)).sqrt() + self.eps)).to(g.dtype), new


class MARS(Optimizer):
    """MARS for all parameters; the first arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, gamma, form: See `MARSRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import MARS
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = MARS(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'last_grad', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        form: str = "adamw",
    ) -> None:
        super().__init__(
            params, MARSRule(betas=betas, eps=eps, gamma=gamma, form=form), lr=lr, weight_decay=weight_decay
        )
