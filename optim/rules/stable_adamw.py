"""StableAdamW: AdamW with Adafactor's clipping of the update."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.moments import correction, scalar_moment, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class StableAdamWRule(UpdateRule):
    """StableAdamW: AdamW with Adafactor's clipping of the update, which replaces the clipping of gradients.

        u = m / (sqrt(v) + eps) / max(1, r),  r = rms(g / sqrt(max(v, eps^2)))

    The averages are unbiased at every step: m <- m + (1 - b1) / (1 - b1^t) (g - m), and likewise v with b2 and g^2.
    There is one r per tensor. If it exceeds 1, weight decay is divided by it as well.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.

    Shapes:
        Any. Not elementwise, because of the root mean square over the tensor.

    State:
        8 bytes per parameter (two float32 moments), a step count, and the last max(1, r).

    Source:
        Wortsman et al. 2023, arXiv 2304.13013, algorithm 2; warner-benjamin/optimi.

    Differs:
        In the paper's algorithm weight decay is not divided by r. The published code divides it, and so does this rule.
    """

    name: ClassVar[str] = "stable_adamw"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("StableAdamWRule", self.betas))
        check_non_negative("StableAdamWRule", eps=self.eps)

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero step count, and a divisor of 1."""
        moments = {"exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}
        return {"step": zero_step(), "clip": scalar_moment(param, 1.0)} | moments

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        m, v = state["exp_avg"], state["exp_avg_sq"]
        g = grad.to(m.dtype)
        t = state["step"] + 1
        w1, w2 = ((1 - b) / correction(b, t) for b in (b1, b2))
        m = (1 - w1).to(g.dtype) * m + w1.to(g.dtype) * g
        v = (1 - w2).to(g.dtype) * v + w2.to(g.dtype) * (g * g)
        ratio = g * g / v.clamp(min=max(self.eps, 1e-19) ** 2)  # 0 if no gradient was ever non-zero, also for eps = 0
        clip = ratio.mean().sqrt().clamp(min=1.0) if g.numel() else state["clip"]
        return m / (v.sqrt() + self.eps) / clip, {"step": t, "clip": clip, "exp_avg": m, "exp_avg_sq": v}

    def decay(self, direction: OfParam, state: State, param: OfParam) -> OfParam:
        """Return the parameter divided by max(1, r) of the step."""
        return param / state["clip"]


class StableAdamW(Optimizer):
    """StableAdamW for all parameters; the first arguments are those of optimi.StableAdamW.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `StableAdamWRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import StableAdamW
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = StableAdamW(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['clip', 'exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, StableAdamWRule(betas=betas, eps=eps), lr=lr, weight_decay=weight_decay)
