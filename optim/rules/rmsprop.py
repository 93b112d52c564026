"""RMSprop: the gradient divided by its root mean square, with or without momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_flag, check_non_negative, check_unit_interval
from optim.moments import with_l2, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class RMSpropRule(UpdateRule):
    """RMSprop: the gradient divided by its root mean square, with or without momentum.

        u = b,  b <- momentum b + g / (sqrt(v - a^2) + eps)

    Here v <- alpha v + (1 - alpha) g^2, and a is the same average of g if `centered`, otherwise 0. The bias of v is not
    corrected.

    Args:
        alpha: The decay rate of v.
        eps: Added to the denominator.
        momentum: The decay rate of b.
        centered: Whether to divide by the standard deviation instead of the root mean square.
        l2: The factor of p in the term l2 p that is first added to the gradient (torch's form of weight decay).

    Shapes:
        Elementwise. The averages have the parameter's shape.

    State:
        4 bytes per parameter (one float32 average; 4 more bytes with momentum, 4 more if centred) and a step count.

    Source:
        Tieleman & Hinton 2012 (Coursera, lecture 6.5); `torch.optim.RMSprop`.

    Differs:
        Weight decay is decoupled; torch adds it to the gradient (`l2`).
    """

    name: ClassVar[str] = "rmsprop"

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    l2: float = 0.0

    def __post_init__(self) -> None:
        check_unit_interval("RMSpropRule", alpha=self.alpha, momentum=self.momentum)
        check_non_negative("RMSpropRule", eps=self.eps, l2=self.l2)
        check_flag("RMSpropRule", centered=self.centered)

    def init(self, param: OfParam) -> State:
        """Return zero averages and a zero step count."""
        keys = ["exp_avg_sq", *["momentum_buffer"] * (self.momentum > 0), *["grad_avg"] * self.centered]
        return {"step": zero_step()} | {key: zero_moment(param) for key in keys}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the averages' dtype, and the new state."""
        g = with_l2(grad.to(state["exp_avg_sq"].dtype), param, self.l2)
        v = (self.alpha * state["exp_avg_sq"]).addcmul(g, g, value=1 - self.alpha)
        new = {"step": state["step"] + 1, "exp_avg_sq": v}
        if self.centered:
            a = new["grad_avg"] = state["grad_avg"].lerp(g, 1 - self.alpha)
            v = (v - a * a).clamp(min=0.0)  # the variance, which rounding may make negative
        direction = g / (v.sqrt() + self.eps)
        if self.momentum > 0:
            direction = new["momentum_buffer"] = self.momentum * state["momentum_buffer"] + direction
        return direction, new


class RMSprop(Optimizer):
    """RMSprop for all parameters; the first arguments are those of `torch.optim.RMSprop`.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        alpha, eps, momentum, centered, l2: See `RMSpropRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import RMSprop
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = RMSprop(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,
        centered: bool = False,
        l2: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            RMSpropRule(alpha=alpha, eps=eps, momentum=momentum, centered=centered, l2=l2),
            lr=lr,
            weight_decay=weight_decay,
        )
