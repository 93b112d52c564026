"""Sophia-H: momentum over Hutchinson's estimate of the Hessian diagonal, clipped element by element."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from optim.checks import check_non_negative, check_positive, checked_betas
from optim.curvature import CurvatureRule
from optim.optimizer import Optimizer, Params
from optim.rule import State, zero_moment, zero_step


@dataclass(frozen=True, kw_only=True)
class SophiaHRule(CurvatureRule):
    """u = clip(m / max(gamma h, eps), -1, 1), with m <- b1 m + (1 - b1) g, and at a refresh h <- b2 h + (1 - b2) z H z,
    z standard normal (`curvature.hutchinson`).

    Shapes: elementwise; both buffers have the parameter's shape.
    State: 8 bytes a parameter (two float32 buffers) and a step count, which tells `curvature.refresh` what is due.
    Source: Liu et al. 2023, arXiv 2305.14342, algorithms 1 and 3; the authors published no code for it.
    Differs: other implementations scale by lr / gamma (pytorch_optimizer, equal after re-parameterising), or correct
    the bias of m and use the previous h (Levanter).

    Where h is not positive the step has full size, sign(m): so also until the first refresh, which comes before the
    first step.
    """

    name: ClassVar[str] = "sophia_h"
    probe: ClassVar[Literal["labels", "normal", "signs"]] = "normal"

    betas: tuple[float, float] = (0.96, 0.99)
    gamma: float = 0.01
    eps: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", checked_betas("SophiaHRule", self.betas))
        check_non_negative("SophiaHRule", gamma=self.gamma)
        check_positive("SophiaHRule", eps=self.eps)

    def init(self, param: Tensor) -> State:
        """Zero momentum, curvature and step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "hessian": zero_moment(param)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, within -1 and 1, in the buffers' dtype."""
        m, h = state["exp_avg"], state["hessian"]
        m = m.lerp(grad.to(m.dtype), 1 - self.betas[0])
        direction = (m / (self.gamma * h).clamp_min(self.eps)).clamp(-1, 1)
        return direction, {"step": state["step"] + 1, "exp_avg": m, "hessian": h}

    def absorb(self, estimate: Tensor, state: State) -> State:
        """h after a refresh; estimate: z H z."""
        return {"hessian": state["hessian"].lerp(estimate, 1 - self.betas[1])}


class SophiaH(Optimizer):
    """`Optimizer` running `SophiaHRule`; call `optim.curvature.refresh` before every step."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        refresh_every: int = 10,
    ) -> None:
        rule = SophiaHRule(betas=betas, gamma=gamma, eps=eps, refresh_every=refresh_every)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
