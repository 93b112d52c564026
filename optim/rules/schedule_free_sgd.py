"""Schedule-Free SGD: averaged weights instead of a decreasing learning rate."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_unit_interval
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State
from optim.rules.schedule_free import ScheduleFreeRule


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSGDRule(ScheduleFreeRule):
    """Schedule-Free SGD: `ScheduleFreeRule` with the gradient itself, n = g + weight_decay y.

    Run it with a constant learning rate.

    Args:
        momentum: The weight of the average in y, which replaces momentum.
        warmup_steps, r, weight_lr_power: See `ScheduleFreeRule`.

    Shapes:
        Elementwise. The tensor of the state has the parameter's shape.

    State:
        4 bytes per parameter (z - y in float32), a step count and four numbers.

    Source:
        Defazio et al. 2024, arXiv 2405.15682; facebookresearch/schedule_free.

    Differs:
        See `ScheduleFreeRule`.
    """

    name: ClassVar[str] = "schedule_free_sgd"

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_unit_interval("ScheduleFreeSGDRule", momentum=self.momentum)
        super().__post_init__()

    @property
    def beta(self) -> float:
        """The weight of x in y."""
        return self.momentum

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction of y, in the dtype of the state, and the new state."""
        return self.moved(grad.to(state["offset"].dtype), state, param)


class ScheduleFreeSGD(Optimizer):
    """Schedule-Free SGD for all parameters; call `eval()` before evaluating or saving, and `train()` after it.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        momentum, warmup_steps, r, weight_lr_power: See `ScheduleFreeSGDRule`.
        weight_decay: Weight decay at y, which is part of the step of z.

    Example:
        >>> import torch
        >>> from optim import ScheduleFreeSGD
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = ScheduleFreeSGD(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['lr', 'lr_max', 'offset', 'step', 'weight_decay', 'weight_sum']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        super().__init__(
            params,
            ScheduleFreeSGDRule(momentum=momentum, warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power),
            lr=lr,
            weight_decay=weight_decay,
        )
