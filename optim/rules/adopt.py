"""ADOPT: Adam whose second moment does not contain the gradient that it divides."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.moments import with_l2, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class ADOPTRule(UpdateRule):
    """ADOPT: Adam whose second moment does not contain the gradient that it divides, so that it converges for any b2.

        u = m,  m <- b1 m + (1 - b1) clip(g / max(sqrt(v), eps), (t - 1)^c)

    Here v is the second moment before the current gradient; it then becomes v <- b2 v + (1 - b2) g^2. The first step
    only sets v = g^2 and does not change the parameter.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: The smallest denominator.
        clip_exponent: The exponent c; None for no clipping.
        l2: The factor of p in the term l2 p that is first added to the gradient (the code without `decouple`).

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments) and a step count.

    Source:
        Taniguchi et al. 2024, arXiv 2411.02853; iShohei220/adopt, version 3.1 with `decouple=True`.
    """

    name: ClassVar[str] = "adopt"

    betas: tuple[float, float] = (0.9, 0.9999)
    eps: float = 1e-6
    clip_exponent: float | None = 0.25
    l2: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("ADOPTRule", self.betas))
        check_non_negative("ADOPTRule", eps=self.eps, l2=self.l2)
        if self.clip_exponent is not None:
            check_non_negative("ADOPTRule", clip_exponent=self.clip_exponent)

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        m, v = state["exp_avg"], state["exp_avg_sq"]
        g = with_l2(grad.to(m.dtype), param, self.l2)
        t = state["step"]
        first = (t == 0).to(v.device)
        n = g / v.sqrt().clamp(min=self.eps)
        if self.clip_exponent is not None:
            bound = (t.double() ** self.clip_exponent).to(g.dtype)
            n = torch.minimum(torch.maximum(n, -bound), bound)
        m = torch.where(first, m, m.lerp(n, 1 - b1))
        v = torch.where(first, g * g, (b2 * v).addcmul(g, g, value=1 - b2))
        return torch.where(first, 0.0, m), {"step": t + 1, "exp_avg": m, "exp_avg_sq": v}

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return the parameter, or zero at the first step, which does not change it."""
        return torch.where((state["step"] <= 1).to(param.device), 0.0, param)


class ADOPT(Optimizer):
    """ADOPT for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, clip_exponent, l2: See `ADOPTRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import ADOPT
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = ADOPT(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        clip_exponent: float | None = 0.25,
        l2: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            ADOPTRule(betas=betas, eps=eps, clip_exponent=clip_exponent, l2=l2),
            lr=lr,
            weight_decay=weight_decay,
        )
