"""Sophia-H: momentum divided by Hutchinson's estimate of the Hessian diagonal, with elementwise clipping."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from optim.checks import check_non_negative, check_positive, checked_betas
from optim.curvature import CurvatureRule
from optim.moments import zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State


@dataclass(frozen=True, kw_only=True)
class SophiaHRule(CurvatureRule):
    """Sophia-H: momentum divided by Hutchinson's estimate of the Hessian diagonal, with elementwise clipping.

        u = clip(m / max(gamma h, eps), -1, 1),  m <- b1 m + (1 - b1) g

    A refresh sets h <- b2 h + (1 - b2) z H z with a standard normal z (`curvature.hutchinson`). Where h is not
    positive, the step is sign(m), which has full size. This also holds before the first refresh, which precedes the
    first step.

    Args:
        betas: (b1, b2), the decay rates of momentum and curvature.
        gamma: The factor of h.
        eps: The smallest denominator.
        refresh_every: The number of steps from one refresh to the next.

    Shapes:
        Elementwise. Both buffers have the parameter's shape.

    State:
        8 bytes per parameter (two float32 buffers) and a step count, by which `curvature.refresh` knows what is due.

    Source:
        Liu et al. 2023, arXiv 2305.14342, algorithms 1 and 3; the authors published no code for it.

    Differs:
        Other implementations scale by lr / gamma (pytorch_optimizer, which is equivalent after reparametrisation), or
        correct the bias of m and use the previous h (Levanter).
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

    def init(self, param: OfParam) -> State:
        """Return zero momentum, zero curvature, and a zero step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "hessian": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, between -1 and 1 in the buffers' dtype, and the new state."""
        m, h = state["exp_avg"], state["hessian"]
        m = m.lerp(grad.to(m.dtype), 1 - self.betas[0])
        direction = (m / (self.gamma * h).clamp_min(self.eps)).clamp(-1, 1)
        return direction, {"step": state["step"] + 1, "exp_avg": m, "hessian": h}

    def absorb(self, estimate: OfParam, state: State) -> State:
        """Return the new h after a refresh.

        Args:
            estimate: z H z, of the parameter's shape.
            state: The state of the parameter, which is not changed.

        Returns:
            The entries of the state that change.
        """
        return {"hessian": state["hessian"].lerp(estimate, 1 - self.betas[1])}


class SophiaH(Optimizer):
    """Sophia-H for all parameters; call `optim.curvature.refresh` before every step.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, gamma, eps: See `SophiaHRule`.
        weight_decay: Decoupled weight decay.
        refresh_every: See `SophiaHRule`.

    Example:
        >>> import torch
        >>> from optim import SophiaH, curvature
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SophiaH(model.named_parameters(), lr=1e-3)
        >>> labels = torch.tensor([0, 1, 2])
        >>> loss_fn = lambda: torch.nn.functional.cross_entropy(model(torch.ones(3, 8)), labels)
        >>> loss_fn().backward()
        >>> _ = curvature.refresh(optimizer, loss_fn)
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'hessian', 'step']
    """

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
