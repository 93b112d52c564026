"""Prodigy: Adam that estimates its learning rate during training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_positive, check_unit_interval, checked_betas
from optim.moments import correction, scalar_setting, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.sharding import is_sharded

PIECE = 16_384
"""The number of entries in one sum, small enough that torch does not divide it among threads."""


@dataclass(frozen=True, kw_only=True)
class ProdigyRule(UpdateRule):
    """Prodigy: Adam that estimates its learning rate during training. Keep lr at 1, and schedule it from there.

        u = c d (m / (sqrt(v) + d' eps) + weight_decay p)

    Here m <- b1 m + (1 - b1) d g, v <- b2 v + (1 - b2) d^2 g^2, and c = sqrt(1 - b2^t) / (1 - b1^t) with
    `use_bias_correction`, otherwise c = 1. The number d is an estimate of the distance from the start to a solution,
    and is common to all tensors of a param group. It becomes d' = max(d, d_coef a / |s|_1), where a is a sum of d / d0
    c d lr <g, p_0 - p> and s a sum of d / d0 c d lr g, both with the decay rate b3. d' is the d of the next step. Only
    steps change d; a map uses that of the last step.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        beta3: b3, the decay rate of the sums; None for sqrt(b2).
        eps: Added to the denominator.
        use_bias_correction: Whether c corrects the bias of the moments.
        safeguard_warmup: Whether s is a sum of d / d0 d g, so that a warm-up does not increase d too much.
        d0: The initial value of d.
        d_coef: A factor of the estimate, which replaces the learning rate as the setting to tune.
        growth_rate: The largest d' / d; None for no limit.

    Shapes:
        Any. Not elementwise, because d depends on all tensors of a param group.

    State:
        16 bytes per parameter (m, v, s and p_0 - p in float32), a step count and six numbers.

    Source:
        Mishchenko & Defazio 2023, arXiv 2306.06101; konstmish/prodigy with `decouple=True`.

    Differs:
        There is one d per param group, where the published code has one for all groups; use a single group if their
        settings are equal. p_0 - p is computed as the sum of the steps, so that it is not rounded for bfloat16
        parameters. A step at a learning rate of 0 is counted in t. `slice_p`, which saves memory, does not exist here.
    """

    name: ClassVar[str] = "prodigy"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-8
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("ProdigyRule", self.betas))
        if self.beta3 is not None:
            check_unit_interval("ProdigyRule", beta3=self.beta3)
        check_positive("ProdigyRule", eps=self.eps, d0=self.d0, d_coef=self.d_coef)
        check_flag("ProdigyRule", use_bias_correction=self.use_bias_correction, safeguard_warmup=self.safeguard_warmup)
        if self.growth_rate is not None and not 1 <= self.growth_rate < math.inf:
            raise ValueError(f"ProdigyRule: growth_rate = {self.growth_rate!r}; it must be at least 1, or None")

    def state_settings(self) -> dict[str, Any]:
        """Return the setting that only the start of a state reads."""
        return {"d0": self.d0}

    def init(self, param: OfParam) -> State:
        """Return zero moments, zero sums, and d0 as the estimate."""
        tensors = {key: zero_moment(param) for key in ("exp_avg", "exp_avg_sq", "s", "moved")}
        numbers = {key: scalar_setting(param) for key in ("lr", "weight_decay", "d_numerator")}
        return (
            {"step": zero_step()}
            | tensors
            | numbers
            | {key: scalar_setting(param) + self.d0 for key in ("d", "d_next", "d_max")}
        )

    @property
    def reads(self) -> frozenset[str]:
        """The learning rate, which the estimate contains, and the weight decay, which d scales."""
        return frozenset({"lr", "weight_decay"})

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Compute d' from the gradients of all parameters that are about to be stepped."""
        leader = max(group, key=lambda state: float(state["step"]))
        d, most, numerator = (float(leader[key]) for key in ("d_next", "d_max", "d_numerator"))
        first = float(torch.tensor(self.d0, dtype=leader["d"].dtype))
        after, beta3 = d, self._beta3
        lr = float(states[0]["lr"])
        rate = d * lr * float(self._corrected(leader["step"] + 1))
        weight = d / self.d0 * (d if self.safeguard_warmup else rate)
        delta, denominator = 0.0, 0.0
        for grad, state in zip(grads, states, strict=True):
            g = grad.to(state["s"].dtype)
            delta += d / self.d0 * rate * _total(g * state["moved"])
            denominator += _total((beta3 * state["s"] + weight * g).abs())
        if lr > 0 and denominator > 0:
            numerator = beta3 * numerator + delta
            hat = self.d_coef * numerator / denominator
            after = max(d, hat) if d == first else d
            most = max(most, hat)
            after = most if self.growth_rate is None else min(most, after * self.growth_rate)
        for state in {id(state): state for state in (*group, *states)}.values():
            for key, value in (("d", d), ("d_next", after), ("d_max", most), ("d_numerator", numerator)):
                state[key].fill_(value)

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        m, v, s = state["exp_avg"], state["exp_avg_sq"], state["s"]
        g, p = grad.to(m.dtype), param.to(m.dtype)
        t, d, lr, decay = state["step"] + 1, state["d"], state["lr"], state["weight_decay"]
        c = self._corrected(t).to(m.dtype)
        weight = d / self.d0 * d * (1.0 if self.safeguard_warmup else lr * c)
        moves = (lr > 0).to(m.device)
        m = torch.where(moves, b1 * m + d * (1 - b1) * g, m)
        v = torch.where(moves, b2 * v + d * d * (1 - b2) * (g * g), v)
        s = torch.where(moves, self._beta3 * s + weight * g, s)
        direction = c * d * (m / (v.sqrt() + state["d_next"] * self.eps) + decay * p)
        new = {"step": t, "exp_avg": m, "exp_avg_sq": v, "s": s, "moved": state["moved"] + lr * direction}
        return direction, {**state, **new, "d": state["d_next"]}

    @property
    def _beta3(self) -> float:
        return math.sqrt(self.betas[1]) if self.beta3 is None else self.beta3

    def _corrected(self, t: Tensor) -> Tensor:
        """Return c as a float64 scalar."""
        if not self.use_bias_correction:
            return torch.ones_like(t, dtype=torch.float64)
        return correction(self.betas[1], t).sqrt() / correction(self.betas[0], t)


def _total(x: Tensor) -> float:
    """Return the sum over all entries on all ranks; on the CPU it does not depend on the number of threads."""
    if is_sharded(x):
        return float(x.sum().full_tensor())  # type: ignore[attr-defined]
    if x.is_cuda or x.numel() <= PIECE:
        return float(x.sum())
    x = x.reshape(-1)
    whole = x.numel() // PIECE * PIECE
    # torch divides a single long sum among threads, but of several sums each thread computes whole ones
    return _total(torch.cat([x[:whole].view(-1, PIECE).sum(1), x[whole:].sum().view(1)]))


class Prodigy(Optimizer):
    """Prodigy for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, beta3, eps, use_bias_correction, safeguard_warmup, d0, d_coef, growth_rate: See `ProdigyRule`.
        weight_decay: Weight decay, which is scaled by d like every step.

    Example:
        >>> import torch
        >>> from optim import Prodigy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Prodigy(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['d', 'd_max', 'd_next', 'd_numerator', 'exp_avg', 'exp_avg_sq', 'lr', 'moved', 's', 'step', 'weight_decay']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float | None = None,
    ) -> None:
        super().__init__(
            params,
            ProdigyRule(
                betas=betas,
                beta3=beta3,
                eps=eps,
                use_bias_correction=use_bias_correction,
                safeguard_warmup=safeguard_warmup,
                d0=d0,
                d_coef=d_coef,
                growth_rate=growth_rate,
            ),
            lr=lr,
            weight_decay=weight_decay,
        )
