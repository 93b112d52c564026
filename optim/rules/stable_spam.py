"""Stable-SPAM: SPAM for low-precision training, with adaptive clipping and normalisation of gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_counts, check_flag, check_non_negative, check_share, check_unit_interval, checked_betas
from optim.moments import correction, scalar_moment, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.rules.spam import catch_up
from optim.sharding import largest


@dataclass(frozen=True, kw_only=True)
class StableSPAMRule(UpdateRule):
    """Stable-SPAM: SPAM for low-precision training, with adaptive clipping and normalisation of gradients.

        u = m / (1 - b^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Here m <- b m + (1 - b) g'' and v <- b2 v + (1 - b2) g''^2, where

    - AdaClip turns g into g': with M = max |g|, T <- gamma3 T + (1 - gamma3) M and h = T / (1 - gamma3^t), entries with
      |g| > h become g h / M;
    - AdaGN turns g' into g'': with q = |g'|, A <- c A + (1 - c) q and B <- gamma2 B + (1 - gamma2) q^2, g'' = g' / q A
      / (1 - c^t) / (sqrt(B / (1 - gamma2^t)) + eps); a zero gradient stays zero;
    - b = s b1 and c = s gamma1. Without `total_T`, s = 1. With it, s follows a cosine of the number of calls of `step`
      from 1 down to `eta_min` (and rises again after `total_T` calls).

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominators.
        gamma1, gamma2, gamma3: The decay rates of A, B and T; gamma1 = -1 stands for b1.
        total_T: The number of calls of `step` over which s decreases; None for s = 1.
        eta_min: The smallest s.
        update_proj_gap: The number of calls from one reset of m and v to the next; 0 for no resets.
        separate_counters: Whether the moments have their own step count; see below.

    Shapes:
        Any. Not elementwise, because M and q depend on the whole tensor.

    State:
        8 bytes per parameter (two float32 moments), three scalars per tensor (T, A and B under the published names
        `m_max_t`, `m_norm_t` and `v_norm_t`) and three counts: `step`, `calls` as in `SPAMRule`, and `moment_step`,
        which is reset together with the moments.

    Source:
        Huang et al. 2025, arXiv 2502.17055, algorithm 1; TianjinYellow/StableSPAM, galore_torch/stablespam.py.

    Differs:
        - As in the published code (``separate_counters=False``), the call that resets still steps with the old moments,
          corrected as if t = 1, and then sets them to zero; from then on t is too large by one for the moments. T, A
          and B are not reset but use the same t, so that h increases by a factor of up to 1 / (1 - gamma3) and hardly
          any spike is clipped for a long time. ``separate_counters=True`` is what the paper describes: m and v are zero
          before the step of that call and have their own count, and T, A and B continue with theirs.
        - There is no `amsgrad`, and the number of calls is part of the state (the published code loses it when a run is
          resumed).
    """

    name: ClassVar[str] = "stable_spam"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    gamma1: float = 0.7
    gamma2: float = 0.9
    gamma3: float = 0.999
    total_T: int | None = None
    eta_min: float = 0.5
    update_proj_gap: int = 1000
    separate_counters: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("StableSPAMRule", self.betas))
        check_non_negative("StableSPAMRule", eps=self.eps)
        check_share("StableSPAMRule", eta_min=self.eta_min)
        check_unit_interval("StableSPAMRule", gamma2=self.gamma2, gamma3=self.gamma3)
        if self.gamma1 != -1:
            check_unit_interval("StableSPAMRule", gamma1=self.gamma1)
        check_counts("StableSPAMRule", update_proj_gap=self.update_proj_gap)
        if self.total_T is not None:
            check_counts("StableSPAMRule", total_T=self.total_T)
        check_flag("StableSPAMRule", separate_counters=self.separate_counters)

    def init(self, param: OfParam) -> State:
        """Return zero moments, scalars and counts."""
        counts = {key: zero_step() for key in ("step", "calls", "moment_step")}
        scalars = {key: scalar_moment(param) for key in ("m_max_t", "m_norm_t", "v_norm_t")}
        return {**counts, **scalars, "exp_avg": zero_moment(param), "exp_avg_sq": zero_moment(param)}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        dtype = m.dtype
        g = grad.to(dtype)
        step, calls, moment_step = (state[key] + 1 for key in ("step", "calls", "moment_step"))
        s = self.beta_scale(calls)
        b1, b2 = s * self.betas[0], self.betas[1]
        gamma1 = s * (self.betas[0] if self.gamma1 == -1 else self.gamma1)
        t = step if self.separate_counters else moment_step

        most = largest(g)
        top = self.gamma3 * state["m_max_t"] + (1 - self.gamma3) * most
        height = (top / correction(self.gamma3, t)).to(dtype)
        g = torch.where(g.abs() > height, g / most * height, g)

        norm = g.square().sum().sqrt()
        norms = (gamma1 * state["m_norm_t"] + (1 - gamma1) * norm).to(dtype)
        squares = self.gamma2 * state["v_norm_t"] + (1 - self.gamma2) * norm * norm
        mean, square = norms / correction(gamma1, t), squares / correction(self.gamma2, t)
        g = torch.where(norm > 0, g / norm * (mean / (square.sqrt() + self.eps)).to(dtype), g)

        reset = calls % self.update_proj_gap == 0 if self.update_proj_gap else torch.zeros_like(calls, dtype=torch.bool)
        moment_step = torch.where(reset, 1.0, moment_step)
        here = reset.to(m.device)
        if self.separate_counters:
            m, v = torch.where(here, 0.0, m), torch.where(here, 0.0, v)
        m = (b1 * m + (1 - b1) * g).to(dtype)
        v = b2 * v + (1 - b2) * g * g
        c1, c2 = correction(b1, moment_step), correction(b2, moment_step)
        direction = m / c1.to(dtype) / (v.sqrt() / c2.sqrt().to(dtype) + self.eps)
        if not self.separate_counters:
            m, v = torch.where(here, 0.0, m), torch.where(here, 0.0, v)
        return direction, {
            "step": step,
            "calls": calls,
            "moment_step": moment_step,
            "m_max_t": top,
            "m_norm_t": norms,
            "v_norm_t": squares,
            "exp_avg": m,
            "exp_avg_sq": v,
        }

    def beta_scale(self, calls: Tensor) -> float | Tensor:
        """Return s of the class docstring.

        Args:
            calls: The number of the call of `step`, a scalar; the first call is 1.

        Returns:
            A float64 scalar, or 1.0 without `total_T`.
        """
        if self.total_T is None:
            return 1.0
        wave = 1 + torch.cos(math.pi / (self.total_T + 1) * calls.double())
        return self.eta_min + (1 - self.eta_min) * wave / 2

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Set `calls` of a parameter that had no gradient in some calls to that of its group."""
        catch_up("calls", states, group)


class StableSPAM(Optimizer):
    """Stable-SPAM for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `StableSPAMRule`.
        weight_decay: Decoupled weight decay.
        gamma1, gamma2, gamma3, total_T, eta_min: See `StableSPAMRule`.
        update_proj_gap, separate_counters: See `StableSPAMRule`.

    Example:
        >>> import torch
        >>> from optim import StableSPAM
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = StableSPAM(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['calls', 'exp_avg', 'exp_avg_sq', 'm_max_t', 'm_norm_t', 'moment_step', 'step', 'v_norm_t']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        total_T: int | None = None,
        eta_min: float = 0.5,
        update_proj_gap: int = 1000,
        separate_counters: bool = False,
    ) -> None:
        rule = StableSPAMRule(
            betas=betas,
            eps=eps,
            gamma1=gamma1,
            gamma2=gamma2,
            gamma3=gamma3,
            total_T=total_T,
            eta_min=eta_min,
            update_proj_gap=update_proj_gap,
            separate_counters=separate_counters,
        )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
