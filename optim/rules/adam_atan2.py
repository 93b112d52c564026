"""Adam-atan2: Adam without an epsilon."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_positive, checked_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class AdamAtan2Rule(UpdateRule):
    """Adam-atan2: Adam without an epsilon, so that the scale of the gradients has no effect.

        u = a atan2(m / (1 - b1^t), b sqrt(v / (1 - b2^t)))

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2. No coordinate of u is larger than a pi / 2.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        a: The factor of the direction. For small ratios the direction is a m / (b sqrt(v)); with 1.27 its size is about
            that of Adam's.
        b: The factor of the square root.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments) and a step count.

    Source:
        Everett et al. 2024, arXiv 2407.05872, section 4.3; lucidrains/adam-atan2-pytorch.
    """

    name: ClassVar[str] = "adam_atan2"

    betas: tuple[float, float] = (0.9, 0.99)
    a: float = 1.27
    b: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("AdamAtan2Rule", self.betas))
        check_positive("AdamAtan2Rule", a=self.a, b=self.b)

    def init(self, param: OfParam) -> State:
        """Return zero moments and a zero step count."""
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        m = state["exp_avg"].lerp(g, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        root = self.b * (v / correction(b2, t)).sqrt()
        direction = self.a * (m / correction(b1, t)).to(g.dtype).atan2(root.to(g.dtype))
        return direction, {"step": t, "exp_avg": m, "exp_avg_sq": v}


class AdamAtan2(Optimizer):
    """Adam-atan2 for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, a, b: See `AdamAtan2Rule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import AdamAtan2
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdamAtan2(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        a: float = 1.27,
        b: float = 1.0,
    ) -> None:
        super().__init__(params, AdamAtan2Rule(betas=betas, a=a, b=b), lr=lr, weight_decay=weight_decay)
