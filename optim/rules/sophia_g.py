"""Sophia-G: momentum over a Gauss-Newton diagonal, clipped element by element."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from optim.checks import check_non_negative, check_positive, checked_betas
from optim.curvature import CurvatureRule
from optim.optimizer import Optimizer, Params
from optim.rule import State, zero_moment, zero_step


@dataclass(frozen=True, kw_only=True)
class SophiaGRule(CurvatureRule):
    """u = clip(m / (rho h + eps), -1, 1), with m <- b1 m + (1 - b1) g, and at a refresh h <- b2 h + (1 - b2) B g~^2,
    g~ the gradient of the mean loss over B labels drawn from the model (`curvature.gauss_newton`).

    Shapes: elementwise; both buffers have the parameter's shape.
    State: 8 bytes a parameter (two float32 buffers) and a step count, which tells `curvature.refresh` what is due.
    Source: Liu et al. 2023, arXiv 2305.14342, algorithm 3; Liuhong99/Sophia.
    Differs: the published code keeps h without the factor B and multiplies by ``bs`` = B in the step; here B is counted
    at each refresh, which is the same for a constant B, and right where it varies (supervised tokens). It refreshes
    after steps k, 2k, ... on the batch of that step; `curvature.refresh` at the same parameters, before the step that
    follows, on its batch. The paper refreshes before the first step too.

    Until the first refresh h = 0 and u = sign(m): warm the learning rate up. The authors advise a `rho` that leaves 10
    to 50 % of the coordinates unclipped (0.03 to 0.08), betas (0.965, 0.99) and gradient clipping at norm 1.
    """

    name: ClassVar[str] = "sophia_g"
    probe: ClassVar[Literal["labels", "normal", "signs"]] = "labels"
    refresh_at_start: ClassVar[bool] = False

    betas: tuple[float, float] = (0.965, 0.99)
    rho: float = 0.04
    eps: float = 1e-15

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", checked_betas("SophiaGRule", self.betas))
        check_non_negative("SophiaGRule", rho=self.rho)
        check_positive("SophiaGRule", eps=self.eps)

    def init(self, param: Tensor) -> State:
        """Zero momentum, curvature and step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "hessian": zero_moment(param)}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, within -1 and 1, in the buffers' dtype."""
        m, h = state["exp_avg"], state["hessian"]
        m = m.lerp(grad.to(m.dtype), 1 - self.betas[0])
        direction = (m / (self.rho * h + self.eps)).clamp(-1, 1)
        return direction, {"step": state["step"] + 1, "exp_avg": m, "hessian": h}

    def absorb(self, estimate: Tensor, state: State) -> State:
        """h after a refresh; estimate: B g~^2."""
        return {"hessian": state["hessian"].lerp(estimate, 1 - self.betas[1])}


class SophiaG(Optimizer):
    """`Optimizer` running `SophiaGRule`; call `optim.curvature.refresh` before every step."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        eps: float = 1e-15,
        refresh_every: int = 10,
    ) -> None:
        rule = SophiaGRule(betas=betas, rho=rho, eps=eps, refresh_every=refresh_every)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
