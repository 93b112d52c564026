"""NAdam: Adam with Nesterov momentum that increases by a schedule."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.moments import correction, moment_dtype, with_l2, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class NAdamRule(UpdateRule):
    """NAdam: Adam with Nesterov momentum that increases by a schedule.

        u = ((1 - mu_t) / (1 - M_t) g + mu_{t+1} / (1 - M_t mu_{t+1}) m) / (sqrt(v / (1 - b2^t)) + eps)

    Here mu_t = b1 (1 - 0.5 0.96^(t momentum_decay)), M_t = mu_1 ... mu_t, m <- b1 m + (1 - b1) g and v <- b2 v + (1 -
    b2) g^2.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        momentum_decay: How fast mu increases.
        l2: The factor of p in the term l2 p that is first added to the gradient, so that it becomes part of the
            direction (torch's default form of weight decay).

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments), a step count, and M, a scalar of the moments' dtype on the CPU.

    Source:
        Dozat 2016 (ICLR workshop, "Incorporating Nesterov momentum into Adam"); `torch.optim.NAdam`, whose state dicts
        can be loaded.

    Differs:
        torch keeps M in float32 for float64 parameters too. Weight decay is decoupled (`decoupled_weight_decay=True` in
        torch).
    """

    name: ClassVar[str] = "nadam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    l2: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("NAdamRule", self.betas))
        check_non_negative("NAdamRule", eps=self.eps, momentum_decay=self.momentum_decay, l2=self.l2)

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero step count, and 1, the empty product."""
        return {
            "step": zero_step(),
            "mu_product": torch.ones((), dtype=moment_dtype(param), device="cpu"),
            "exp_avg": zero_moment(param),
            "exp_avg_sq": zero_moment(param),
        }

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        g = with_l2(grad.to(state["exp_avg"].dtype), param, self.l2)
        t = state["step"] + 1
        mu, mu_next = self._momentum(t), self._momentum(t + 1)
        product = state["mu_product"].double() * mu
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
        direction = ahead / ((v / correction(b2, t)).sqrt() + self.eps)
        kept = product.to(state["mu_product"].dtype)
        return direction.to(g.dtype), {"step": t, "mu_product": kept, "exp_avg": m, "exp_avg_sq": v}

    def _momentum(self, t: Tensor) -> Tensor:
        """Return mu_t as a float64 scalar."""
        return self.betas[0] * (1 - 0.5 * 0.96 ** (t.double() * self.momentum_decay))


class NAdam(Optimizer):
    """NAdam for all parameters; the first arguments are those of `torch.optim.NAdam`.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, momentum_decay, l2: See `NAdamRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import NAdam
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = NAdam(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        *,
        l2: float = 0.0,
    ) -> None:
        rule = NAdamRule(betas=betas, eps=eps, momentum_decay=momentum_decay, l2=l2)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
