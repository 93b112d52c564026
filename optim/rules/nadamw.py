"""NAdamW: AdamW with Nesterov momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule


@dataclass(frozen=True, kw_only=True)
class NAdamWRule(UpdateRule):
    """NAdamW: AdamW with Nesterov momentum at a constant rate.

        u = (b1 m + (1 - b1) g) / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2. This is the baseline of the AlgoPerf benchmark. `nadam` is
    Dozat's algorithm, which differs in that its momentum follows a schedule.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.

    Shapes:
        Elementwise. The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments) and a step count.

    Source:
        Dahl et al. 2023, arXiv 2306.07179 (mlcommons/algorithmic-efficiency); timm.optim.NAdamW is the same algorithm.
    """

    name: ClassVar[str] = "nadamw"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("NAdamWRule", self.betas))
        check_non_negative("NAdamWRule", eps=self.eps)

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
        direction = m.lerp(g, 1 - b1) / correction(b1, t) / ((v / correction(b2, t)).sqrt() + self.eps)
        return direction.to(g.dtype), {"step": t, "exp_avg": m, "exp_avg_sq": v}


class NAdamW(Optimizer):
    """NAdamW for all parameters; the first arguments are those of timm.optim.NAdamW.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `NAdamWRule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import NAdamW
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = NAdamW(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, NAdamWRule(betas=betas, eps=eps), lr=lr, weight_decay=weight_decay)
