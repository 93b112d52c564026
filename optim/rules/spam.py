"""SPAM: Adam with clipped gradient spikes and periodic momentum resets."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.checks import check_counts, check_flag, check_non_negative, check_positive_share, checked_betas
from optim.moments import correction, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule
from optim.sharding import is_sharded


@dataclass(frozen=True, kw_only=True)
class SPAMRule(UpdateRule):
    """SPAM: Adam with clipped gradient spikes and periodic momentum resets.

        u = w sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    Here m <- b1 m + (1 - b1) g' and v <- b2 v + (1 - b2) g'^2. The clipped gradient g' is sign(g) sqrt(threshold v)
    where g^2 > threshold v, with the v before this step, and g elsewhere. Every `DeltaT` calls of `Optimizer.step`, m
    and v are set to 0 before the step (t is not). After a reset, w rises from 0.01 to 1 over `warmup_steps` calls: w =
    1 - 0.99 (1 + cos(pi s / (warmup_steps + 1))) / 2, s calls after the reset. Gradients are not clipped in the first
    `grad_accu_steps` - 1 calls, nor in the same number of calls after a reset.

    With `grad_accu_steps` = 1 the first gradient is clipped to 0 because v = 0, and so are all following ones. No
    parameter changes before the first reset, after which one gradient is not clipped. With 0 no parameter ever changes.
    The published code behaves in the same way; `SPAM` warns. An entry that only had zero gradients when clipping begins
    (rows of an embedding that did not occur in `grad_accu_steps` calls) has v = 0, is clipped to 0 and does not change
    until the next reset, also as in the published code.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        threshold: The square of the largest ratio of |g| to sqrt(v).
        DeltaT: The number of calls from one reset to the next; 0 means no resets.
        warmup_steps: The number of calls over which w rises after a reset.
        grad_accu_steps: The number of calls before clipping begins, plus 1; see above.
        density: A density below 1 makes momentum sparse: only the entries of a random mask, which is drawn anew at each
            reset, have momentum and change. Weight decay applies to every entry.
        seed: The seed of the masks.
        correct_bias: Whether the bias of the moments is corrected; otherwise u = w m / (sqrt(v) + eps).

    Shapes:
        Elementwise, except with `density` below 1: then the mask depends on an entry's position, so that slices and
        shards are not supported (DTensor parameters are refused). The moments have the parameter's shape.

    State:
        8 bytes per parameter (two float32 moments), a step count t, and `calls`, the number of calls of `step` in which
        the param group had any gradient. Resets happen for all parameters of a group at once; t is counted per
        parameter.

    Source:
        Huang et al. 2025, arXiv 2501.06842, algorithm 1; TianjinYellow/SPAM-Optimizer.

    Differs:
        - The published code decays weights after the update; here weights decay before the update, as under every rule.
          The two are equal with lr (1 - lr wd) instead of lr and wd / (1 - lr wd) instead of wd.
        - With ``DeltaT=0`` the published code divides by zero.
        - Masks are a function of `seed`, the reset and the entry's position, with independent draws (the published code
          draws the first mask with an exact count), so that they need no state. Moments are stored densely, so that the
          trajectory is that of the method, but memory is not saved. The published code decays a copy of the masked
          tensors, which has no effect.
    """

    name: ClassVar[str] = "spam"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    correct_bias: bool = True
    warmup_steps: int = 150
    threshold: float = 5000.0
    DeltaT: int = 500
    grad_accu_steps: int = 20
    density: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("SPAMRule", self.betas))
        check_non_negative("SPAMRule", eps=self.eps, threshold=self.threshold)
        check_flag("SPAMRule", correct_bias=self.correct_bias)
        check_counts("SPAMRule", warmup_steps=self.warmup_steps, DeltaT=self.DeltaT, seed=self.seed)
        check_counts("SPAMRule", grad_accu_steps=self.grad_accu_steps)
        check_positive_share("SPAMRule", density=self.density)

    def init(self, param: OfParam) -> State:
        """Return zero moments and zero counts.

        Raises:
            ValueError: For a sharded parameter with `density` below 1.
        """
        if self.density < 1 and is_sharded(param):
            raise ValueError(
                f"SPAMRule: density = {self.density!r} draws its mask by positions in the whole tensor, but this "
                "parameter is sharded (DTensor); use density=1.0"
            )
        m, v = zero_moment(param), zero_moment(param)
        return {"step": zero_step(), "calls": zero_step(), "exp_avg": m, "exp_avg_sq": v}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        m, v = state["exp_avg"], state["exp_avg_sq"]
        g = grad.to(m.dtype)
        t, calls = state["step"] + 1, state["calls"] + 1
        n = calls.double()
        since = n % self.DeltaT if self.DeltaT else n  # calls since the last reset
        if self.DeltaT:
            reset = (since == 0).to(m.device)
            m, v = torch.where(reset, 0.0, m), torch.where(reset, 0.0, v)
        if self.density < 1:
            g = torch.where(self._mask(n, param), g, 0.0)
        if self.threshold:
            clipping = (since >= self.grad_accu_steps).to(m.device)
            limit = self.threshold * v
            g = torch.where(clipping & (g * g > limit), g.sign() * limit.sqrt(), g)
        m = m.lerp(g, 1 - b1)
        v = (b2 * v).addcmul(g, g, value=1 - b2)
        factor = self.warmup(n, since)
        if self.correct_bias:
            factor = factor * correction(b2, t).sqrt() / correction(b1, t)
        direction = factor.to(m.dtype) * m / (v.sqrt() + self.eps)
        return direction, {"step": t, "calls": calls, "exp_avg": m, "exp_avg_sq": v}

    def warmup(self, n: Tensor, since: Tensor) -> Tensor:
        """Return w of the class docstring, which is below 1 for `warmup_steps` calls after a reset.

        Args:
            n: The number of the call, a scalar.
            since: The number of calls since the last reset, a scalar.

        Returns:
            A float64 scalar.
        """
        if not self.DeltaT:
            return torch.ones_like(n)
        wave = 1 - 0.99 * (1 + torch.cos(math.pi / (self.warmup_steps + 1) * since)) / 2
        return torch.where((n < self.DeltaT) | (since >= self.warmup_steps), 1.0, wave)

    def _mask(self, n: Tensor, param: Tensor) -> Tensor:
        """Return which entries have momentum in call n: each with probability `density`, drawn anew at each reset."""
        draw = torch.floor(n / self.DeltaT).long() if self.DeltaT else torch.zeros_like(n, dtype=torch.int64)
        key = _mixed(_mixed(draw.to(param.device)) ^ self.seed)
        bits = _mixed(torch.arange(param.numel(), device=param.device) ^ key)
        return (bits < self.density * 2**32).view(param.shape)

    def share(self, grads: Sequence[Tensor], states: Sequence[State], group: Sequence[State]) -> None:
        """Set `calls` of a parameter that had no gradient in some calls to that of its group."""
        catch_up("calls", states, group)


def _mixed(x: Tensor) -> Tensor:
    """Hash 32-bit integers by a permutation without visible patterns (Wellons' lowbias32, public domain)."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def catch_up(key: str, states: Sequence[State], group: Sequence[State]) -> None:
    """Set a count of some states to the largest one of the group.

    Args:
        key: The entry of the states.
        states: The states to change, in place.
        group: The states of all parameters of the group.
    """
    most = torch.stack([state[key] for state in group]).amax()
    behind = (torch.stack([state[key] for state in states]) < most).tolist()
    for state, lags in zip(states, behind, strict=True):
        if lags:
            state[key].copy_(most)


class SPAM(Optimizer):
    """SPAM for all parameters; the arguments are those of the published code.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate.
        betas, eps: See `SPAMRule`.
        weight_decay: Decoupled weight decay.
        correct_bias, warmup_steps, threshold, DeltaT, grad_accu_steps, density, seed: See `SPAMRule`.

    Example:
        >>> import torch
        >>> from optim import SPAM
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = SPAM(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['calls', 'exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        warmup_steps: int = 150,
        threshold: float = 5000.0,
        DeltaT: int = 500,
        grad_accu_steps: int = 20,
        density: float = 1.0,
        seed: int = 0,
    ) -> None:
        rule = SPAMRule(
            betas=betas,
            eps=eps,
            correct_bias=correct_bias,
            warmup_steps=warmup_steps,
            threshold=threshold,
            DeltaT=DeltaT,
            grad_accu_steps=grad_accu_steps,
            density=density,
            seed=seed,
        )
        if threshold and grad_accu_steps < 2:
            warnings.warn(
                f"SPAM: with grad_accu_steps = {grad_accu_steps} all gradients are clipped to 0"
                + (f" until call {DeltaT}, the first reset" if grad_accu_steps and DeltaT else "")
                + ", as in the published code; it counts calls of step(), so set it to at least 2, or threshold to 0",
                UserWarning,
                stacklevel=2,
            )
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
