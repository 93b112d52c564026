"""Sophia-G: momentum divided by a Gauss-Newton diagonal, with elementwise clipping."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from optim.checks import check_non_negative, check_positive, checked_betas
from optim.curvature import CurvatureRule
from optim.moments import zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State


@dataclass(frozen=True, kw_only=True)
class SophiaGRule(CurvatureRule):
    """Sophia-G: momentum divided by a Gauss-Newton diagonal, with elementwise clipping.

        u = clip(m / (rho h + eps), -1, 1),  m <- b1 m + (1 - b1) g

    A refresh sets h <- b2 h + (1 - b2) B g~^2, where g~ is the gradient of the mean loss over B labels drawn from the
    model (`curvature.gauss_newton`). Until the first refresh h = 0 and u = sign(m), so use a learning-rate warm-up.

    Args:
        betas: (b1, b2), the decay rates of momentum and curvature; the authors recommend (0.965, 0.99).
        rho: The factor of h. The authors recommend a value that leaves 10 to 50 % of the coordinates unclipped (0.03 to
            0.08), and gradient clipping at norm 1.
        eps: Added to the denominator.
        refresh_every: The number of steps from one refresh to the next.

    Shapes:
        Elementwise. Both buffers have the parameter's shape.

    State:
        8 bytes per parameter (two float32 buffers) and a step count, by which `curvature.refresh` knows what is due.

    Source:
        Liu et al. 2023, arXiv 2305.14342, algorithm 3; Liuhong99/Sophia.

    Differs:
        The published code stores h without the factor B and multiplies by ``bs`` = B in the step. Here B is counted at
        each refresh, which is the same for a constant B, and correct if it varies (supervised tokens). The published
        code refreshes after steps k, 2k, ... on the batch of that step; `curvature.refresh` refreshes at the same
        parameters, but before the next step and on its batch. The paper also refreshes before the first step.
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

    def init(self, param: OfParam) -> State:
        """Return zero momentum, zero curvature, and a zero step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "hessian": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, between -1 and 1 in the buffers' dtype, and the new state."""
        m, h = state["exp_avg"], state["hessian"]
        m = m.lerp(grad.to(m.dtype), 1 - self.betas[0])
        direction = (m / (self.rho * h + self.eps)).clamp(-1, 1)
        return direction, {"step": state["step"] + 1, "exp_avg": m, "hessian": h}

    def absorb(self, estimate: OfParam, state: State) -> State:
        """Return the new h after a refresh.

        Args:
            estimate: B g~^2, of the parameter's shape.
            state: The state of the parameter, which is not changed.

        Returns:
            The entries of the state that change.
        """
        return {"hessian": state["hessian"].lerp(estimate, 1 - self.betas[1])}


class SophiaG(Optimizer):
    """Sophia-G for all parameters; call `optim.curvature.refresh` before every step.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, rho: See `SophiaGRule`.
        weight_decay: Decoupled weight decay.
        eps, refresh_every: See `SophiaGRule`.

    Example:
        >>> import torch
        >>> from optim import SophiaG, curvature
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SophiaG(model.named_parameters(), lr=1e-3)
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
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        eps: float = 1e-15,
        refresh_every: int = 10,
    ) -> None:
        rule = SophiaGRule(betas=betas, rho=rho, eps=eps, refresh_every=refresh_every)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
