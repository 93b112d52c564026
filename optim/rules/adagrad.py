"""Adagrad: the gradient divided by the root of the sum of all squared gradients."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from optim.checks import check_non_negative
from optim.moments import with_l2, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class AdagradRule(UpdateRule):
    """Adagrad: the gradient divided by the root of the sum of all squared gradients.

        u = g / (sqrt(v) + eps) / (1 + (t - 1) lr_decay),  v <- v + g^2

    Args:
        lr_decay: How fast the learning rate decreases additionally.
        initial_accumulator_value: The value of v before the first step.
        eps: Added to the denominator.
        l2: The factor of p in the term l2 p that is first added to the gradient (torch's form of weight decay).

    Shapes:
        Elementwise. The sum has the parameter's shape.

    State:
        4 bytes per parameter (one float32 sum) and a step count.

    Source:
        Duchi et al. 2011 (JMLR 12, 2121-2159); `torch.optim.Adagrad`.

    Differs:
        Weight decay is decoupled; torch adds it to the gradient (`l2`).
    """

    name: ClassVar[str] = "adagrad"

    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    l2: float = 0.0

    def __post_init__(self) -> None:
        check_non_negative(
            "AdagradRule",
            lr_decay=self.lr_decay,
            initial_accumulator_value=self.initial_accumulator_value,
            eps=self.eps,
            l2=self.l2,
        )

    def state_settings(self) -> dict[str, Any]:
        """Return the setting that only the start of a state reads."""
        return {"initial_accumulator_value": self.initial_accumulator_value}

    def init(self, param: OfParam) -> State:
        """Return the initial sum and a zero step count."""
        return {"step": zero_step(), "sum": zero_moment(param) + self.initial_accumulator_value}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the sum's dtype, and the new state."""
        g = with_l2(grad.to(state["sum"].dtype), param, self.l2)
        v = state["sum"].addcmul(g, g)
        direction = g / (v.sqrt() + self.eps)
        if self.lr_decay:
            direction = (direction / (1 + state["step"].double() * self.lr_decay)).to(g.dtype)
        return direction, {"step": state["step"] + 1, "sum": v}


class Adagrad(Optimizer):
    """Adagrad for all parameters; the first arguments are those of `torch.optim.Adagrad`.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        lr_decay, initial_accumulator_value, eps, l2: See `AdagradRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import Adagrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Adagrad(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['step', 'sum']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        *,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        l2: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            AdagradRule(lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps, l2=l2),
            lr=lr,
            weight_decay=weight_decay,
        )
