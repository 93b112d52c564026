"""Adafactor: a second moment that stores only row and column means of a matrix."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_choice, check_flag, check_non_negative, check_positive, check_unit_interval
from optim.moments import moment_dtype, scalar_setting, zero_moment, zero_step
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule

CONVENTIONS = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class AdafactorRule(UpdateRule):
    """Adafactor: a second moment that stores only row and column means of a matrix.

        step = s rho clip(g / sqrt(V)),  s = max(eps[1], rms(p)),  rho = min(lr, 1 / sqrt(t))

    V is a rank-one estimate of the average of g^2, computed from its means over rows and over columns, with the decay
    rate 1 - t^beta2_decay. For vectors V is stored in full. clip(x) scales x to a root mean square of at most
    `clip_threshold` over the tensor.

    Args:
        beta2_decay: The exponent of V's decay rate, at most 0.
        eps: Two numbers, a bound for V and the smallest s. None stands for the resolution of the dtype ("torch") or for
            1e-30 ("transformers").
        clip_threshold: The largest root mean square of g / sqrt(V).
        beta1: The decay rate of an average of the steps ("transformers" only); None for no average, which also saves
            its memory.
        scale_parameter: Whether s is as above; otherwise s = 1.
        relative_step: Whether rho is as above; otherwise rho = lr. With an lr of 1e-2 this is transformers' own
            relative step.
        warmup_init: Whether lr in rho is multiplied by 1e-4 t ("transformers" only: 1e-6 t at an lr of 1e-2).
        convention: Which of the two codes to follow where they differ. "torch" bounds V from below by eps[0]^2 and
            decays by lr weight_decay p; "transformers" adds eps[0] to g^2 and decays by s rho weight_decay p.

    Shapes:
        Any. Tensors with more than two dimensions are factored along the last two. Not elementwise.

    State:
        0 bytes per parameter (for a matrix, 4 bytes per row and 4 per column; for vectors, 4 bytes per parameter; with
        beta1, 4 more bytes per parameter), a step count, the learning rate and the weight decay.

    Source:
        Shazeer & Stern 2018, arXiv 1804.04235; `torch.optim.Adafactor`; transformers.Adafactor.
    """

    name: ClassVar[str] = "adafactor"
    elementwise: ClassVar[bool] = False

    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    clip_threshold: float = 1.0
    beta1: float | None = None
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False
    convention: str = "torch"

    def __post_init__(self) -> None:
        called = "AdafactorRule"
        check_choice(called, CONVENTIONS, convention=self.convention)
        decay = self.beta2_decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not -math.inf < decay <= 0:
            raise ValueError(f"{called}: beta2_decay = {decay!r}; it must be a finite number of at most 0")
        if not isinstance(self.eps, Sequence) or isinstance(self.eps, str) or len(self.eps) != 2:
            raise ValueError(f"{called}: eps = {self.eps!r}; expected two numbers, such as (1e-30, 1e-3)")
        first, second = self.eps
        check_non_negative(called, **({} if first is None else {"eps[0]": first}), **{"eps[1]": second})
        object.__setattr__(self, "eps", (None if first is None else float(first), float(second)))
        check_positive(called, clip_threshold=self.clip_threshold)
        flags = ("scale_parameter", "relative_step", "warmup_init")
        check_flag(called, **{key: getattr(self, key) for key in flags})
        if self.beta1 is not None:
            check_unit_interval(called, beta1=self.beta1)
        if self.convention == "torch" and (self.beta1 is not None or self.warmup_init):
            raise ValueError(f"{called}: beta1 and warmup_init need convention='transformers'")
        if self.warmup_init and not self.relative_step:
            raise ValueError(f"{called}: warmup_init needs relative_step=True")

    def init(self, param: OfParam) -> State:
        """Return zero averages and a zero step count; steps set the learning rate and the weight decay."""
        state = {"step": zero_step(), "lr": scalar_setting(param), "weight_decay": scalar_setting(param)}
        if self.beta1 is not None:
            state["exp_avg"] = zero_moment(param)
        return state | ({"exp_avg_sq": zero_moment(param)} if param.ndim < 2 else zero_sides("exp_avg_sq", param))

    @property
    def reads(self) -> frozenset[str]:
        """The learning rate, which a relative step may reduce, and the weight decay, which is scaled with it."""
        return frozenset({"lr", "weight_decay"})

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return step / lr of the class docstring with its weight decay, in the averages' dtype, and the new state."""
        dtype = moment_dtype(param)
        g, p, lr, decay = grad.to(dtype), param.to(dtype), state["lr"], state["weight_decay"]
        t = state["step"] + 1
        weight = (t.double() ** self.beta2_decay).to(dtype)
        floor = self.eps[0]
        if floor is None:
            floor = 1e-30 if self.convention == "transformers" else torch.finfo(param.dtype).eps
        squares = g * g + (floor if self.convention == "transformers" else 0.0)
        least = floor if self.convention == "torch" else 0.0
        new = {"step": t, "lr": lr, "weight_decay": decay}
        if g.ndim < 2:
            v = new["exp_avg_sq"] = (1 - weight) * state["exp_avg_sq"] + weight * squares
            n = g * v.clamp(min=least * least).rsqrt()
        else:
            new |= averaged_sides("exp_avg_sq", squares, state, weight)
            n = g * inverse_root("exp_avg_sq", new, least)
        n = clipped(n, self.clip_threshold)
        share = self._share(lr, t).to(device=p.device)
        if self.scale_parameter and p.numel():
            share = share * p.square().mean().sqrt().clamp(min=self.eps[1])
        n = share * n
        if self.beta1 is not None:  # an average of steps, and not of directions
            m = new["exp_avg"] = self.beta1 * state["exp_avg"] + (1 - self.beta1) * lr * n
            n = torch.where((lr > 0).to(m.device), m / torch.where(lr > 0, lr, 1.0), n)
        return n + decay * (p if self.convention == "torch" else share * p), new

    def _share(self, lr: Tensor, t: Tensor) -> Tensor:
        """Return rho / lr as a scalar with the dtype of lr; for lr = 0, its value for a very small lr."""
        if not self.relative_step:
            return torch.ones_like(lr)
        rate = lr.double().clamp(min=1e-30)
        rho = torch.minimum(rate * (1e-4 * t.double() if self.warmup_init else 1.0), t.double() ** -0.5)
        return (rho / rate).to(lr.dtype)


def zero_sides(key: str, param: Tensor) -> State:
    """Return zero row and column means (over the last dimension, and over the one before it), as entries of a state.

    Args:
        key: The prefix of the entries' names.
        param: The parameter, of shape [..., m, n].

    Returns:
        `<key>_row` of shape [..., m] and `<key>_col` of shape [..., n], with the dtype `moment_dtype(param)`.
    """
    dtype, shape = moment_dtype(param), param.shape
    return {
        f"{key}_row": param.new_zeros(shape[:-1], dtype=dtype, requires_grad=False),
        f"{key}_col": param.new_zeros((*shape[:-2], shape[-1]), dtype=dtype, requires_grad=False),
    }


def averaged_sides(key: str, x: Tensor, state: State, weight: float | Tensor) -> State:
    """Return the running averages of row and column means after one more tensor.

    Args:
        key: The prefix of the entries' names.
        x: The new tensor, of shape [..., m, n].
        state: The state that has the averages.
        weight: The weight of the new means.

    Returns:
        `<key>_row` and `<key>_col`.
    """
    return {
        f"{key}_{side}": (1 - weight) * state[f"{key}_{side}"] + weight * _mean(x, dim)
        for side, dim in (("row", -1), ("col", -2))
    }


def inverse_root(key: str, state: State, least: float = 0.0) -> Tensor:
    """Return 1 / sqrt(V) for the rank-one matrix V = row col / mean(row).

    Args:
        key: The prefix of the entries' names.
        state: The state that has the row and column means.
        least: V is bounded from below by `least`^2.

    Returns:
        A tensor of shape [..., m, n].
    """
    row, col = state[f"{key}_row"], state[f"{key}_col"]
    mean = _mean(row, -1, keepdim=True)
    if least:
        return (row.unsqueeze(-1) * col.unsqueeze(-2) / mean.clamp(min=least).unsqueeze(-1)).clamp(min=least**2).rsqrt()
    return (row / mean).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)


def clipped(x: Tensor, threshold: float) -> Tensor:
    """Return x scaled to a root mean square of at most `threshold` over all entries.

    Args:
        x: A tensor of any shape.
        threshold: The largest root mean square.

    Returns:
        A tensor of x's shape and dtype.
    """
    return x / (x.square().mean().sqrt() / threshold).clamp(min=1.0) if x.numel() else x


def _mean(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """Return the mean along a dimension; 0 if it has no entries."""
    return x.sum(dim, keepdim=keepdim) / max(x.shape[dim], 1)


class Adafactor(Optimizer):
    """Adafactor for all parameters; the first arguments are those of `torch.optim.Adafactor`.

    ``Adafactor(params, lr=1e-3, convention="transformers", scale_parameter=False, relative_step=False)`` is what
    `Trainer(optim="adafactor")` runs.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate, limited to 1 / sqrt(t) under `relative_step`.
        beta2_decay, eps: See `AdafactorRule`.
        weight_decay: Weight decay, which the convention makes part of the step.
        options: Other fields of `AdafactorRule`.

    Example:
        >>> import torch
        >>> from optim import Adafactor
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = Adafactor(model.named_parameters(), lr=1e-3)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg_sq_col', 'exp_avg_sq_row', 'lr', 'step', 'weight_decay']
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        rule = AdafactorRule().with_settings(beta2_decay=beta2_decay, eps=eps, **options)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
