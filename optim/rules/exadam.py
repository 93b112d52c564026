"""EXAdam: Adam with the current gradient in the numerator and cross-over debiasing terms."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class EXAdamRule(UpdateRule):
    """EXAdam: Adam with the current gradient in the numerator and cross-over debiasing terms.

        u = (m + g) / c1 d1 / (sqrt(v / c2 d2) + eps),  c1 = 1 - b1^t,  c2 = 1 - b2^t

    Here d1 = 1 + v / (v + eps) b2^t and d2 = 1 + m^2 / (m^2 + eps) b1^t (d1 depends on v and d2 on m, so that they
    cross over), m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2.

    The first step is large: g is divided by c1 = 1 - b1 although it was never averaged, so that with the default betas
    the first update is about 16 lr and the second about 7 lr. This is the published method; use a warm-up or a smaller
    learning rate than Adam's. The method is not scale-invariant: v / (v + eps) and m^2 / (m^2 + eps) change when
    gradients are of size sqrt(eps).

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator, and used in d1 and d2.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments) and a step count.

    Source:
        Adly 2024, arXiv 2412.20302 version 2; AhmedMostafa16/EXAdam.

    Differs:
        Version 1 and the first published code multiply lr by ln(sqrt(2) sqrt(t + 1)); version 2 and the current code do
        not. The current file fails on construction (it uses numpy without importing it); this rule implements what it
        would compute.
    """

    name: ClassVar[str] = "exadam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("EXAdamRule", self.betas))
        check_non_negative("EXAdamRule", eps=self.eps)

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
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
    """EXAdam for all parameters. Its first steps are many times lr, so use a warm-up.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `EXAdamRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import EXAdam
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = EXAdam(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, EXAdamRule(betas=betas, eps=eps), lr=lr, weight_decay=weight_decay)
