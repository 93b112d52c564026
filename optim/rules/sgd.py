"""SGD: the gradient itself, or its heavy-ball or Nesterov momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_flag, check_unit_interval
from optim.optimizer import Optimizer, Params
from optim.rule import State, UpdateRule, moment_dtype, zero_moment, zero_step


@dataclass(frozen=True, kw_only=True)
class SGDRule(UpdateRule):
    """u = b, or u = g + momentum b (nesterov), with b <- momentum b + (1 - dampening) g, and b = g at first;
    u = g at momentum 0.

    Shapes: elementwise; the buffer has the parameter's shape.
    State: 4 bytes a parameter (a float32 buffer), none at momentum 0; and a step count.
    Source: `torch.optim.SGD`; Sutskever et al. 2013 for this form of Nesterov's momentum.
    Differs: weight decay is decoupled, as for every rule here; torch adds it to the gradient, which is the same at
    momentum 0 only.

    At momentum 0 the direction is the gradient, in the moments' dtype: the plain gradients of LESS's target side.
    """

    name: ClassVar[str] = "sgd"

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_unit_interval("SGDRule", momentum=self.momentum)
        check_flag("SGDRule", nesterov=self.nesterov)
        if not isinstance(self.dampening, int | float) or not 0 <= self.dampening <= 1:
            raise ValueError(f"SGDRule: dampening = {self.dampening!r}; it must be a number with 0 <= dampening <= 1")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("SGDRule: nesterov needs a momentum above 0 and dampening 0")

    def init(self, param: Tensor) -> State:
        """A step count, and a zero buffer if there is momentum."""
        return {"step": zero_step()} | ({"momentum_buffer": zero_moment(param)} if self.momentum else {})

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the moments' dtype."""
        g = grad.to(moment_dtype(param))
        new = {"step": state["step"] + 1}
        if self.momentum == 0:
            return g, new
        share = 1 - self.dampening * (state["step"] > 0)  # the first gradient enters whole, as in torch
        b = new["momentum_buffer"] = self.momentum * state["momentum_buffer"] + share * g
        return (g + self.momentum * b if self.nesterov else b), new


class SGD(Optimizer):
    """`Optimizer` running `SGDRule`; arguments as in `torch.optim.SGD`, weight decay decoupled."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        rule = SGDRule(momentum=momentum, dampening=dampening, nesterov=nesterov)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
