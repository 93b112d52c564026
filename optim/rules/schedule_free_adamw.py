"""Schedule-Free AdamW: averaged weights instead of a decreasing learning rate."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.moments import correction, zero_moment
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State
from optim.rules.schedule_free import ScheduleFreeRule


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamWRule(ScheduleFreeRule):
    """Schedule-Free AdamW: `ScheduleFreeRule` with the gradient divided by its root mean square.

        n = g / (sqrt(v / (1 - b2^t)) + eps) + weight_decay y,  v <- b2 v + (1 - b2) g^2

    Run it with a constant learning rate, after a warm-up.

    Args:
        betas: (b1, b2), the weight of the average in y, and the decay rate of v.
        warmup_steps, r, weight_lr_power: See `ScheduleFreeRule`.
        eps: Added to the denominator.

    Shapes:
        Elementwise. Both tensors of the state have the parameter's shape.

    State:
        8 bytes per parameter (v and z - y in float32), a step count and four numbers.

    Source:
        Defazio et al. 2024, arXiv 2405.15682; facebookresearch/schedule_free.

    Differs:
        See `ScheduleFreeRule`. The `inner_momentum` of the published code does not exist here.
    """

    name: ClassVar[str] = "schedule_free_adamw"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("ScheduleFreeAdamWRule", self.betas))
        check_non_negative("ScheduleFreeAdamWRule", eps=self.eps)
        super().__post_init__()

    @property
    def beta(self) -> float:
        """The weight of x in y."""
        return self.betas[0]

    def init(self, param: OfParam) -> State:
        """Return a zero second moment, and the entries of all Schedule-Free rules."""
        return super().init(param) | {"exp_avg_sq": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction of y, in the dtype of the state, and the new state."""
        b2 = self.betas[1]
        g = grad.to(state["exp_avg_sq"].dtype)
        v = (b2 * state["exp_avg_sq"]).addcmul(g, g, value=1 - b2)
        n = g / ((v / correction(b2, state["step"] + 1)).sqrt().to(g.dtype) + self.eps)
        direction, new = self.moved(n, state, param)
        return direction, new | {"exp_avg_sq": v}


class ScheduleFreeAdamW(Optimizer):
    """Schedule-Free AdamW for all parameters; call `eval()` before evaluating or saving, and `train()` after it.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps, warmup_steps, r, weight_lr_power: See `ScheduleFreeAdamWRule`.
        weight_decay: Weight decay at y, which is part of the step of z.

    Example:
        >>> import torch
        >>> from optim import ScheduleFreeAdamW
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = ScheduleFreeAdamW(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg_sq', 'lr', 'lr_max', 'offset', 'step', 'weight_decay', 'weight_sum']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        super().__init__(
            params,
            ScheduleFreeAdamWRule(
                betas=betas, eps=eps, warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power
            ),
            lr=lr,
            weight_decay=weight_decay,
        )
