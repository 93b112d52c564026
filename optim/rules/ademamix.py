"""AdEMAMix: Adam with a second, slow average of the gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_counts, check_non_negative, checked_three_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class AdEMAMixRule(UpdateRule):
    """AdEMAMix: Adam with a second, slow average of the gradient.

        u = (m / (1 - b1^t) + a_t s) / (sqrt(v / (1 - b2^t)) + eps)

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2 as in Adam, and s <- b3_t s + (1 - b3_t) g, which averages
    over tens of thousands of steps. Over the first `alpha_warmup` steps a_t rises linearly to `alpha`, and over the
    first `beta3_warmup` steps the half-life of s rises linearly from that of b1 to that of b3.

    Args:
        betas: (b1, b2, b3), the decay rates of the three averages. If only two are given, b3 is 0.9999.
        alpha: The weight of the slow average.
        alpha_warmup, beta3_warmup: The number of steps of the two warm-ups; 0 for none. The paper uses the length of
            the run for both. Without them, the early training of a large model may diverge.
        eps: Added to the denominator.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        12 bytes per parameter (three float32 moments) and a step count.

    Source:
        Pagliardini et al. 2024, arXiv 2409.03137; apple/ml-ademamix, whose default for alpha is 2 (the runs in the
        paper use 5 to 10).

    Differs:
        With b1 = 0 the published code does not store m.
    """

    name: ClassVar[str] = "ademamix"

    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)
    alpha: float = 2.0
    alpha_warmup: int = 0
    beta3_warmup: int = 0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_three_betas("AdEMAMixRule", self.betas))
        check_non_negative("AdEMAMixRule", alpha=self.alpha, eps=self.eps)
        check_counts("AdEMAMixRule", alpha_warmup=self.alpha_warmup, beta3_warmup=self.beta3_warmup)

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count."""
        moments = {key: zero_moment(param) for key in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
        return {"step": zero_step()} | moments

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2, _ = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        alpha, b3 = self.alpha_at(t), self.beta3_at(t)
        m = state["exp_avg"].lerp(g, 1 - b1)
        s = state["exp_avg_slow"] * b3.to(g.dtype) + g * (1 - b3).to(g.dtype)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        direction = (m / correction(b1, t) + alpha * s) / ((v / correction(b2, t)).sqrt() + self.eps)
        return direction.to(g.dtype), {"step": t, "exp_avg": m, "exp_avg_slow": s, "exp_avg_sq": v}

    def alpha_at(self, t: Tensor) -> float | Tensor:
        """Return a_t.

        Args:
            t: The number of the step, a scalar.

        Returns:
            A float64 scalar, or a number if there is no warm-up.
        """
        if not self.alpha_warmup:
            return self.alpha
        return self.alpha * (t.double() / self.alpha_warmup).clamp(max=1.0)

    def beta3_at(self, t: Tensor) -> Tensor:
        """Return b3_t.

        Args:
            t: The number of the step, a scalar.

        Returns:
            A float64 scalar.
        """
        start, _, end = self.betas
        t = t.double()
        if not self.beta3_warmup:
            return torch.full_like(t, end)
        first, last = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (start, end))
        half_life = first + (last - first) * t / self.beta3_warmup
        return torch.where(t < self.beta3_warmup, 0.5 ** (1 / (half_life + 1)), end)


class AdEMAMix(Optimizer):
    """AdEMAMix for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, alpha, alpha_warmup, beta3_warmup, eps: See `AdEMAMixRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import AdEMAMix
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdEMAMix(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_slow', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        *,
        alpha: float = 2.0,
        alpha_warmup: int = 0,
        beta3_warmup: int = 0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            params,
            AdEMAMixRule(betas=betas, alpha=alpha, alpha_warmup=alpha_warmup, beta3_warmup=beta3_warmup, eps=eps),
            lr=lr,
            weight_decay=weight_decay,
        )
