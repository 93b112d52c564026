"""Adam with its original weight decay, which is part of the gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, checked_betas
from optim.moments import correction, scalar_setting, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class AdamRule(UpdateRule):
    """Adam with its original weight decay: AdamW's direction for g + weight_decay p, without decoupled decay.

        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Here m <- b1 m + (1 - b1) h and v <- b2 v + (1 - b2) h^2, with h = g + weight_decay p. Weight decay is therefore
    scaled like a gradient. `adamw` does not scale it, and is the better choice if decay matters.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        amsgrad: Whether the denominator uses the running maximum of v.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments; 12 with amsgrad), a step count, and the weight decay.

    Source:
        Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; `torch.optim.Adam`.
    """

    name: ClassVar[str] = "adam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("AdamRule", self.betas))
        check_non_negative("AdamRule", eps=self.eps)
        check_flag("AdamRule", amsgrad=self.amsgrad)

    def init(self, param: OfParam) -> State:
        """Return zero moments, a zero step count, and the weight decay, which steps set."""
        state = {
            "step": zero_step(),
            "exp_avg": zero_moment(param),
            "exp_avg_sq": zero_moment(param),
            "weight_decay": scalar_setting(param),
        }
        return state | ({"max_exp_avg_sq": zero_moment(param)} if self.amsgrad else {})

    @property
    def reads(self) -> frozenset[str]:
        """The weight decay, which is part of the gradient."""
        return frozenset({"weight_decay"})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        dtype = state["exp_avg"].dtype
        h = grad.to(dtype) + state["weight_decay"] * param.to(dtype)
        t = state["step"] + 1
        m = state["exp_avg"].lerp(h, 1 - b1)
        v = (b2 * state["exp_avg_sq"]).addcmul(h, h, value=1 - b2)
        new = {"step": t, "exp_avg": m, "exp_avg_sq": v, "weight_decay": state["weight_decay"]}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        return (m / correction(b1, t) / ((v / correction(b2, t)).sqrt() + self.eps)).to(dtype), new


class Adam(Optimizer):
    """Adam for all parameters; the first arguments are those of `torch.optim.Adam`.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, amsgrad: See `AdamRule`.
        weight_decay: Weight decay; this factor times the parameter is added to the gradient.

    Example:
        >>> import torch
        >>> from optim import Adam
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Adam(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step', 'weight_decay']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, AdamRule(betas=betas, eps=eps, amsgrad=amsgrad), lr=lr, weight_decay=weight_decay)
