"""CAME: Adafactor with a factored estimate of its own instability."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optim.checks import check_non_negative, check_positive, checked_three_betas
from optim.moments import zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.rules.adafactor import averaged_sides, clipped, inverse_root, zero_sides


@dataclass(frozen=True, kw_only=True)
class CAMERule(UpdateRule):
    """CAME: Adafactor with a factored estimate of its own instability.

        u = m / sqrt(S),  m <- b1 m + (1 - b1) h,  h = clip(g / sqrt(V))

    V is a rank-one estimate of the average of g^2 + eps[0] with rate b2, computed from its means over rows and over
    columns as in Adafactor, and S is such an estimate for (h - m)^2 + eps[1] with rate b3. clip(h) scales h to a root
    mean square of at most `clip_threshold` over the tensor. For vectors V is stored in full and there is no S: u = m.

    Args:
        betas: (b1, b2, b3), the decay rates of the update, of the squared gradient and of the instability. If only two
            are given, b3 is 0.9999.
        eps: Added to the squared gradient and to the squared difference.
        clip_threshold: The largest root mean square of h.

    Shapes:
        Any. Tensors with more than two dimensions are factored along the last two. Not elementwise.

    State:
        4 bytes per parameter (one float32 average), 8 bytes per row and 8 per column (8 bytes per parameter for
        vectors), and a step count.

    Source:
        Luo et al. 2023, arXiv 2307.02047; yangluo7/CAME.
    """

    name: ClassVar[str] = "came"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, ...] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float] = (1e-30, 1e-16)
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_three_betas("CAMERule", self.betas))
        if not isinstance(self.eps, Sequence) or isinstance(self.eps, str) or len(self.eps) != 2:
            raise ValueError(f"CAMERule: eps = {self.eps!r}; expected two numbers, such as (1e-30, 1e-16)")
        check_non_negative("CAMERule", **{f"eps[{i}]": eps for i, eps in enumerate(self.eps)})
        object.__setattr__(self, "eps", tuple(map(float, self.eps)))
        check_positive("CAMERule", clip_threshold=self.clip_threshold)

    def init(self, param: OfParam) -> State:
        """Return zero averages and a zero step count."""
        state = {"step": zero_step(), "exp_avg": zero_moment(param)}
        if param.ndim < 2:
            return state | {"exp_avg_sq": zero_moment(param)}
        return state | zero_sides("exp_avg_sq", param) | zero_sides("exp_avg_res", param)

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the averages' dtype, and the new state."""
        b1, b2, b3 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        new = {"step": state["step"] + 1}
        squares = g * g + self.eps[0]
        if g.ndim < 2:
            v = new["exp_avg_sq"] = state["exp_avg_sq"].lerp(squares, 1 - b2)
            h = clipped(g * v.rsqrt(), self.clip_threshold)
            m = new["exp_avg"] = state["exp_avg"].lerp(h, 1 - b1)
            return m.clone(), new
        new |= averaged_sides("exp_avg_sq", squares, state, 1 - b2)
        h = clipped(g * inverse_root("exp_avg_sq", new), self.clip_threshold)
        m = new["exp_avg"] = state["exp_avg"].lerp(h, 1 - b1)
        new |= averaged_sides("exp_avg_res", (h - m).square() + self.eps[1], state, 1 - b3)
        return m * inverse_root("exp_avg_res", new), new


class CAME(Optimizer):
    """CAME for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        eps, clip_threshold, betas: See `CAMERule`.
        weight_decay: Decoupled weight decay.

    Example:
        >>> import torch
        >>> from optim import CAME
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = CAME(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_res_col', 'exp_avg_res_row', 'exp_avg_sq_col', 'exp_avg_sq_row', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, ...] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, CAMERule(eps=eps, clip_threshold=clip_threshold, betas=betas), lr=lr, weight_decay=weight_decay
        )
