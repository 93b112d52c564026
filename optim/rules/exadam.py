"""EXAdam: Adam with the present gradient in the numerator and debiasing terms that cross over."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.optimizer import Optimizer, Params
from optim.rule import State, UpdateRule, correction, zero_moment, zero_step


@dataclass(frozen=True, kw_only=True)
class EXAdamRule(UpdateRule):
    """u = (m + g) / c1 d1 / (sqrt(v / c2 d2) + eps), with c1 = 1 - b1^t, c2 = 1 - b2^t,
    d1 = 1 + v / (v + eps) b2^t, d2 = 1 + m^2 / (m^2 + eps) b1^t (d1 is made of v and d2 of m: they cross),
    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2.

    Shapes: elementwise; moments have the parameter's shape.
    State: 8 bytes a parameter (two float32 moments) and a step count.
    Source: Adly 2024, arXiv 2412.20302 version 2; AhmedMostafa16/EXAdam.
    Differs: version 1 and the first published code multiply lr by ln(sqrt(2) sqrt(t + 1)); version 2 dropped it, and
    so did the code. The current file fails on construction (numpy is used but not imported); this is what it computes.

    The first step is large: g is divided by c1 = 1 - b1 although it was never averaged, so with the default betas the
    first update is about 16 lr and the second 7 lr. That is the published method; use a warm-up or a smaller lr than
    Adam's. Not invariant to scale: v / (v + eps) and m^2 / (m^2 + eps) switch at gradients of size sqrt(eps).
    """

    name: ClassVar[str] = "exadam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("EXAdamRule", self.betas))
        check_non_negative("EXAdamRule", eps=self.eps)

    def init(self, param: Tensor) -> State:
        """Zero moments and step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the moments' dtype."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        c1, c2 = correction(b1, t), correction(b2, t)
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        d1 = 1 + (1 - c2) * (v / (v + self.eps))
        d2 = 1 + (1 - c1) * (m * m / (m * m + self.eps))
        direction = (m + g) / c1 * d1 / ((v / c2 * d2).sqrt() + self.eps)
        return direction.to(g.dtype), {"step": t, "exp_avg": m, "exp_avg_sq": v}


class EXAdam(Optimizer):
    """`Optimizer` running `EXAdamRule`; its first steps are many times lr, so warm up."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, EXAdamRule(betas=betas, eps=eps), lr=lr, weight_decay=weight_decay)
