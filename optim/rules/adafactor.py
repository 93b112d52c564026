"""Adafactor: a second moment of a matrix in the memory of its rows and columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.checks import check_flag, check_non_negative, check_unit_interval
from optim.optimizer import Optimizer, Params
from optim.rule import OfParam, State, UpdateRule, moment_dtype, scalar_setting, zero_moment, zero_step

CONVENTIONS = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class AdafactorRule(UpdateRule):
    """Adafactor: a second moment of a matrix in the memory of its rows and columns.

        step = s rho clip(g / sqrt(V)),  s = max(eps[1], rms(p)),  rho = min(lr, 1 / sqrt(t))

    V is a rank-one estimate of the average of g^2, made of its means over rows and over columns, with the decay rate
    1 - t^beta2_decay; vectors have the full V. clip(x) has a root mean square of at most `clip_threshold` over the
    tensor.

    Args:
        beta2_decay: The exponent of V's rate, at most 0.
        eps: (a bound for V, the least s). None stands for the resolution of the dtype ("torch") or 1e-30
            ("transformers").
        clip_threshold: The largest root mean square of g / sqrt(V).
        beta1: The decay rate of an average of the steps ("transformers" only); None for no average and no memory.
        scale_parameter: Whether s is used, otherwise s = 1.
        relative_step: Whether rho is used, otherwise it is lr. Transformers' own relative step is this at an lr of
            1e-2.
        warmup_init: Whether lr in rho is multiplied by 1e-4 t ("transformers" only: 1e-6 t at an lr of 1e-2).
        convention: Where the two codes differ: "torch" bounds V from below by eps[0]^2 and decays by lr weight_decay p;
            "transformers" adds eps[0] to g^2 and decays by s rho weight_decay p.

    Shapes:
        Any. Of more dimensions than two, the last two are factored. Not elementwise.

    State:
        0 bytes per parameter (of a matrix, 4 per row and 4 per column; in vectors, 4 per parameter; with beta1, 4 more
        per parameter), a step count, the learning rate and the weight decay.

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
        if self.convention not in CONVENTIONS:
            raise ValueError(f"{called}: convention = {self.convention!r}; it must be one of {', '.join(CONVENTIONS)}")
        if isinstance(self.beta2_decay, bool) or not isinstance(self.beta2_decay, int | float) or self.beta2_decay > 0:
            raise ValueError(f"{called}: beta2_decay = {self.beta2_decay!r}; it must be a number of at most 0")
        if not isinstance(self.eps, Sequence) or isinstance(self.eps, str) or len(self.eps) != 2:
            raise ValueError(f"{called}: eps = {self.eps!r}; expected two numbers, such as (1e-30, 1e-3)")
        first, second = self.eps
        check_non_negative(called, **({} if first is None else {"eps[0]": first}), **{"eps[1]": second})
        object.__setattr__(self, "eps", (None if first is None else float(first), float(second)))
        check_non_negative(called, clip_threshold=self.clip_threshold)
        if self.clip_threshold == 0:
            raise ValueError(f"{called}: clip_threshold = 0; it must be above 0, or nothing moves")
        flags = ("scale_parameter", "relative_step", "warmup_init")
        check_flag(called, **{key: getattr(self, key) for key in flags})
        if self.beta1 is not None:
            check_unit_interval(called, beta1=self.beta1)
        if self.convention == "torch" and (self.beta1 is not None or self.warmup_init):
            raise ValueError(f"{called}: beta1 and warmup_init go with convention='transformers'")
        if self.warmup_init and not self.relative_step:
            raise ValueError(f"{called}: warmup_init needs relative_step")

    def init(self, param: OfParam) -> State:
        """Return zero averages and a zero step count; steps set the learning rate and the weight decay."""
        state = {"step": zero_step(), "lr": scalar_setting(param), "weight_decay": scalar_setting(param)}
        if self.beta1 is not None:
            state["exp_avg"] = zero_moment(param)
        return state | ({"exp_avg_sq": zero_moment(param)} if param.ndim < 2 else zero_sides("exp_avg_sq", param))

    @property
    def reads(self) -> frozenset[str]:
        """The learning rate, of which only a part may count, and the weight decay, which follows it."""
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
        """rho / lr, as a scalar of the dtype of lr; at a rate of 0, that of the smallest."""
        if not self.relative_step:
            return torch.ones_like(lr)
        rate = lr.double().clamp(min=1e-30)
        rho = torch.minimum(rate * (1e-4 * t.double() if self.warmup_init else 1.0), t.double() ** -0.5)
        return (rho / rate).to(lr.dtype)


def zero_sides(key: str, param: Tensor) -> State:
    """Return zero means over the last dimension and over the one before it, as entries of a state."""
    dtype, shape = moment_dtype(param), param.shape
    return {
        f"{key}_row": param.new_zeros(shape[:-1], dtype=dtype, requires_grad=False),
        f"{key}_col": param.new_zeros((*shape[:-2], shape[-1]), dtype=dtype, requires_grad=False),
    }


def averaged_sides(key: str, x: Tensor, state: State, weight: float | Tensor) -> State:
    """Return the state's means over rows and columns after x [..., m, n], whose means count by `weight`."""
    return {
        f"{key}_{side}": (1 - weight) * state[f"{key}_{side}"] + weight * _mean(x, dim)
        for side, dim in (("row", -1), ("col", -2))
    }


def inverse_root(key: str, state: State, least: float = 0.0) -> Tensor:
    """Return 1 / sqrt(V) [..., m, n] of the rank-one V = row col / mean(row), which is at least `least`^2."""
    row, col = state[f"{key}_row"], state[f"{key}_col"]
    mean = _mean(row, -1, keepdim=True)
    if least:
        return (row.unsqueeze(-1) * col.unsqueeze(-2) / mean.clamp(min=least).unsqueeze(-1)).clamp(min=least**2).rsqrt()
    return (row / mean).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)


def clipped(x: Tensor, threshold: float) -> Tensor:
    """Return x with a root mean square of at most `threshold` over all entries."""
    return x / (x.square().mean().sqrt() / threshold).clamp(min=1.0) if x.numel() else x


def _mean(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """The mean along a dimension; 0 of no entries."""
    return x.sum(dim, keepdim=keepdim) / max(x.shape[dim], 1)


class Adafactor(Optimizer):
    """Adafactor for all parameters; the first arguments are those of `torch.optim.Adafactor`.

    ``Adafactor(params, lr=1e-3, convention="transformers", scale_parameter=False, relative_step=False)`` is what
    `Trainer(optim="adafactor")` runs.

    Args:
        params: The model, its parameters (with or without names), or param groups, as for `Optimizer`.
        lr: Learning rate, of which at most 1 / sqrt(t) counts under `relative_step`.
        beta2_decay, eps: See `AdafactorRule`.
        weight_decay: Weight decay, in the step as the convention has it.
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
