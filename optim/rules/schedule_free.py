"""What the Schedule-Free rules share: averaged weights instead of a decreasing learning rate."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.checks import check_counts, check_non_negative
from optim.moments import scalar_setting, zero_moment, zero_step
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeRule(UpdateRule, ABC):
    """Averaged weights instead of a decreasing learning rate.

        z <- z - lr_t n,  x <- (1 - c) x + c z,  y = (1 - beta) z + beta x,  c = w_t / (w_1 + ... + w_t)

    The parameter is y, at which gradients are computed. The average x should be used for evaluation and be saved: see
    `eval()` and `train()` of the optimizer. n is the gradient, in the form that the method defines, plus weight_decay
    y. The weights are w_t = t^r max(lr_1, ..., lr_t)^weight_lr_power, and lr_t = lr min(1, t / warmup_steps).

    The state stores z - y, from which x = y - (1 - beta) / beta (z - y) is computed.

    Args:
        warmup_steps: The number of steps of a linear warm-up.
        r: The exponent of t in the weights.
        weight_lr_power: The exponent of the largest learning rate so far in the weights.

    Differs:
        A step at a learning rate of 0 changes nothing and does not contribute to the average. In the published code y
        still moves towards z.
    """

    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    def __post_init__(self) -> None:
        called = type(self).__name__
        check_counts(called, warmup_steps=self.warmup_steps)
        check_non_negative(called, r=self.r, weight_lr_power=self.weight_lr_power)
        if not 0 < self.beta < 1:
            raise ValueError(
                f"{called}: the weight of the average in y is {self.beta!r}; it must be above 0 and below 1"
            )

    @property
    @abstractmethod
    def beta(self) -> float:
        """The weight of x in y."""

    @property
    def reads(self) -> frozenset[str]:
        """The learning rate and the weight decay, which are part of the step of z."""
        return frozenset({"lr", "weight_decay"})

    @property
    def averages(self) -> bool:
        """Whether the method averages weights: it does."""
        return True

    def init(self, param: OfParam) -> State:
        """Return z = y, a zero step count and zero weights; steps set the learning rate and the weight decay."""
        scalars = {key: scalar_setting(param) for key in ("lr", "weight_decay", "lr_max", "weight_sum")}
        return {"step": zero_step(), "offset": zero_moment(param)} | scalars

    def moved(self, n: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction of y, and the entries of the new state that all methods have.

        Args:
            n: The gradient in the method's form, without weight decay, in the dtype of the moments.
            state: The state before this gradient.
            param: The parameter.

        Returns:
            The direction, of the parameter's shape, and the entries.
        """
        t, lr, offset = (state["step"] + 1).double(), state["lr"].double(), state["offset"]
        warm = (t / self.warmup_steps).clamp(max=1.0) if self.warmup_steps else torch.ones_like(lr)
        rate = lr * warm
        most = torch.maximum(rate, state["lr_max"].double())
        weight = torch.where(rate > 0, t**self.r * most**self.weight_lr_power, 0.0)
        total = state["weight_sum"].double() + weight
        c = torch.where(weight > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        n = n + state["weight_decay"] * param.to(n.dtype)
        towards = torch.where(lr > 0, c / torch.where(lr > 0, lr, 1.0), 0.0).to(n.dtype)
        along = (warm * (1 - self.beta * (1 - c))).to(n.dtype)
        ahead = (self.beta * rate).to(n.dtype)
        kept = {key: value.to(state[key].dtype) for key, value in (("lr_max", most), ("weight_sum", total))}
        kept |= {"lr": state["lr"], "weight_decay": state["weight_decay"]}
        new = {"step": state["step"] + 1, "offset": (1 - c).to(n.dtype) * (offset - ahead * n)} | kept
        return along * n - towards * offset, new

    def average(self, state: State, param: Tensor) -> Tensor:
        """Return x of the class docstring."""
        return param - (1 - self.beta) / self.beta * state["offset"]

    def from_average(self, state: State, average: Tensor) -> Tensor:
        """Return y of the class docstring from x."""
        return average + (1 - self.beta) / self.beta * state["offset"]
