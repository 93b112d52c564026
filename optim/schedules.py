"""Learning-rate schedules: pure functions from the number of steps taken to a factor on the base learning rate.

    factor = schedule("cosine", total_steps=1000, warmup_steps=30)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

Closed forms, so that a resumed run has the same values. The factor at `step` is that of update number ``step + 1``;
from `total_steps` on every schedule holds its last value. `linear`, `cosine`, `wsd` and `constant` are defined as
transformers' schedulers of the same names. Groups with learning rates of their own: `group_factors`.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from optim.unknown import did_you_mean


def linear(step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Up from 0 in `warmup_steps`, then in a straight line to `min_ratio` at `total_steps`."""
    return _warmed(step, total_steps, warmup_steps, lambda x: 1 + (min_ratio - 1) * x)


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Up from 0 in `warmup_steps`, then half a cosine down to `min_ratio` at `total_steps`."""
    return _warmed(
        step, total_steps, warmup_steps, lambda x: min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * x)) / 2
    )


_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay: str = "1-sqrt",
    min_ratio: float = 0.0,
) -> float:
    """Warm-up from `min_ratio` in `warmup_steps`, stable at 1, decay to `min_ratio` in the last `decay_steps`.

    decay_steps: a fifth of `total_steps` unless given; at most what the warm-up leaves. decay: "linear", "cosine" or
    "1-sqrt" (1 - sqrt(x), x the share of the decay done).
    """
    if step < min(warmup_steps, total_steps):
        return min_ratio + (1 - min_ratio) * step / warmup_steps
    length = total_steps // 5 if decay_steps is None else decay_steps
    start = max(total_steps - length, warmup_steps)
    return min_ratio + (1 - min_ratio) * _DECAYS[decay](_share(step, start, total_steps))


def polynomial(
    step: int, *, total_steps: int, warmup_steps: int = 0, power: float = 2.0, min_ratio: float = 0.0
) -> float:
    """Up from 0 in `warmup_steps`, then (1 - x)^power down to `min_ratio`, x the share done; power 1 is `linear`."""
    return _warmed(step, total_steps, warmup_steps, lambda x: min_ratio + (1 - min_ratio) * math.pow(1 - x, power))


def rex(step: int, *, total_steps: int, warmup_steps: int = 0, d: float = 0.5, min_ratio: float = 0.0) -> float:
    """Up from 0 in `warmup_steps`, then z / ((1 - d) + d z) down to `min_ratio`, z the share that is left: late decay.

    d: 0 is `linear`; nearer to 1 stays high longer (two thirds of the peak at half time with 1/2).
    Source: Chen et al. 2021, arXiv 2107.04197, where d = 1/2 and there is no warm-up.
    Differs: the most copied code, REX_LR, has d = 0.9 and starts again at `total_steps`.
    """

    def fall(x: float) -> float:
        left = 1 - x
        return min_ratio + (1 - min_ratio) * left / ((1 - d) + d * left)

    return _warmed(step, total_steps, warmup_steps, fall)


def uba(step: int, *, total_steps: int, warmup_steps: int = 0, phi: float = 1.0, min_ratio: float = 0.0) -> float:
    """Up from 0 in `warmup_steps`, then 2c / (2 phi + (2 - phi) c) down to `min_ratio`, with c = 1 + cos(pi x).

    x is the share done. phi: 2 is `cosine`, less stays high longer, more falls earlier; above 0.
    Source: arXiv 2505.24452 (unified budget-aware schedule).
    Unverified: no official code was found. The formula is that of a public re-implementation, which restricts phi to
    (0, 2]; the paper's form with several phases, its advice on phi for each optimizer and its results could not be
    checked, and there is no warm-up in what could. The default phi = 1 is ours: a knob to tune (try 0.5, 1, 2, 5).
    """

    def fall(x: float) -> float:
        c = 1 + math.cos(math.pi * x)
        return min_ratio + (1 - min_ratio) * 2 * c / (2 * phi + (2 - phi) * c)

    return _warmed(step, total_steps, warmup_steps, fall)


def one_cycle(
    step: int,
    *,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal: str = "cosine",
    three_phase: bool = False,
) -> float:
    """Up from 1 / div_factor in the first `pct_start`, then down to 1 / (div_factor final_div_factor): its own warm-up.

    anneal: the shape of each piece, "cosine" or "linear". three_phase: as long down to 1 / div_factor as up, then on.
    Source: Smith & Topin, arXiv 1708.07120; `torch.optim.lr_scheduler.OneCycleLR` of ``total_steps + 1`` steps, which
    raises past its end. Its momentum: `one_cycle_momentum`.
    """
    low, phase = 1 / div_factor, _one_cycle_phase(step, total_steps, pct_start, anneal, three_phase)
    floor = low / final_div_factor
    if phase.number == 0:
        return low + (1 - low) * phase.height
    if three_phase and phase.number == 1:
        return low + (1 - low) * phase.height
    top = low if three_phase else 1.0
    return floor + (top - floor) * phase.height


def one_cycle_momentum(
    step: int,
    *,
    total_steps: int,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    pct_start: float = 0.3,
    anneal: str = "cosine",
    three_phase: bool = False,
) -> float:
    """The momentum that mirrors `one_cycle`: down from `max_momentum` while the rate rises, then up again.

    Not a factor, and not in `SCHEDULES`: momenta belong to the frozen rule, so this is for loops that set the momentum
    (or the first beta) of torch's optimizers.
    """
    phase = _one_cycle_phase(step, total_steps, pct_start, anneal, three_phase)
    height = 0.0 if phase.number == 2 else phase.height
    return max_momentum + (base_momentum - max_momentum) * height


class _Phase(NamedTuple):
    number: int
    height: float  # 0 at the phase's low end, 1 at its high end


def _one_cycle_phase(step: int, total_steps: int, pct_start: float, anneal: str, three_phase: bool) -> _Phase:
    """The rise is phase 0, what falls behind it 1, and the tail of `three_phase` 2; torch's ends of the phases."""
    peak = min(max(pct_start * (total_steps + 1) - 1, 0.0), total_steps)
    low = min(2 * peak, total_steps) if three_phase else total_steps
    if step < peak:
        return _Phase(0, 1 - _DECAYS[anneal](_share(step, 0, peak)))
    if step < low or not three_phase:
        return _Phase(1, _DECAYS[anneal](_share(step, peak, low)))
    return _Phase(2, _DECAYS[anneal](_share(step, low, total_steps)))


def blockwise_cosine(
    step: int, *, total_steps: int, warmup_steps: int = 0, ratio: float = 1.0, min_ratio: float = 0.05
) -> float:
    """`cosine` of a block with `ratio` times the base rate: down to `min_ratio` of the base, the same for all blocks.

    Source: arXiv 2502.19002, whose scripts end at base / 20 (base / 10 on C4).
    Differs: their `alpha` multiplies a block's peak and warm-up; set the ratio and `warmup_steps` instead.
    """
    floor = min(min_ratio / ratio, 1.0)
    return cosine(step, total_steps=total_steps, warmup_steps=warmup_steps, min_ratio=floor)


def blockwise_wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    ratio: float = 1.0,
    min_ratio: float = 0.1,
    gamma: float = 1.0,
) -> float:
    """Warm-up from 0, 1 until two thirds, in a line to `min_ratio` of the base rate, the same for all blocks.

    ratio: the block's rate over the base. gamma: the height until one third; from there to two thirds it glides to 1.
    Source: the WSD script of arXiv 2502.19002. Differs: without `alpha`, as in `blockwise_cosine`; a warm-up that is
    longer than two thirds is followed by the decay.
    """
    if step < min(warmup_steps, total_steps):
        return gamma * step / warmup_steps
    first, second = int(total_steps / 3), int(total_steps * 2 / 3)
    if step < second:
        return gamma + (1 - gamma) * _share(step, first, second)
    floor = min(min_ratio / ratio, 1.0)
    return 1 + (floor - 1) * _share(step, max(second, warmup_steps), total_steps)


def constant(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Up from 0 in `warmup_steps`, then 1."""
    return _warmed(step, total_steps, warmup_steps, lambda _: 1.0)


def _warmed(step: int, total_steps: int, warmup_steps: int, fall: Callable[[float], float]) -> float:
    """Up from 0 in `warmup_steps`, then `fall` of the share that is done of the steps after them."""
    if step < min(warmup_steps, total_steps):
        return step / warmup_steps
    return fall(_share(step, warmup_steps, total_steps))


def _share(step: float, start: float, end: float) -> float:
    """How much of start..end is done, 0 to 1; 1 from the end on, also where there is nothing between them."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "wsd": wsd,
    "rex": rex,
    "uba": uba,
    "one_cycle": one_cycle,
    "blockwise_cosine": blockwise_cosine,
    "blockwise_wsd": blockwise_wsd,
    "constant": constant,
}

_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "min_ratio": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "power": (lambda x: 0 < x < math.inf, "above 0"),
    "d": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "phi": (lambda x: 0 < x < math.inf, "above 0"),
    "ratio": (lambda x: 0 < x < math.inf, "above 0"),
    "gamma": (lambda x: 0 < x < math.inf, "above 0"),
    "pct_start": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "div_factor": (lambda x: 1 <= x < math.inf, "at least 1"),
    "final_div_factor": (lambda x: 1 <= x < math.inf, "at least 1"),
}
_SHAPES = {"decay": tuple(_DECAYS), "anneal": ("cosine", "linear")}


def schedule(name: str, *, total_steps: int, warmup_steps: int = 0, **options: Any) -> Callable[[int], float]:
    """The schedule of that name with its options bound: ``step -> factor``, for `torch.optim.lr_scheduler.LambdaLR`.

    total_steps, warmup_steps: optimizer steps. options: see the functions of `SCHEDULES`.
    Raises: ValueError for an unknown name or values out of range, TypeError for an option that the schedule does not
    have (`one_cycle` has its own rise and no `warmup_steps`).
    """
    known = schedule_options(name)
    given = {"total_steps": total_steps, **options}
    if warmup_steps != 0 or "warmup_steps" in known:
        given["warmup_steps"] = warmup_steps
    for key, value in given.items():
        if key not in known:
            raise TypeError(f"schedule {name!r} has no option {key!r}{did_you_mean(key, known)}")
        _check(name, key, value)
    # a partial, not an object with fields: LambdaLR would put an object's fields into its state dict and restore them
    return partial(SCHEDULES[name], **given)


def schedule_options(name: str) -> set[str]:
    """The keywords that the schedule of that name takes. Raises: ValueError for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}{did_you_mean(name, SCHEDULES)}")
    return set(inspect.signature(SCHEDULES[name]).parameters) - {"step"}


def _check(name: str, key: str, value: Any) -> None:
    """Raises: ValueError unless the value is one that the option can have."""
    if key.endswith("_steps"):
        if value is None and key == "decay_steps":
            return
        if type(value) is not int or value < 0:
            raise ValueError(f"schedule {name!r}: {key} = {value!r}; it must be an integer of at least 0")
    elif key in _BOUNDS:
        holds, text = _BOUNDS[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
            raise ValueError(f"schedule {name!r}: {key} = {value!r}; it must be a number {text}")
    elif key in _SHAPES:
        if value not in _SHAPES[key]:
            raise ValueError(f"schedule {name!r}: {key} = {value!r}{did_you_mean(str(value), _SHAPES[key])}")
    elif not isinstance(value, bool):
        raise ValueError(f"schedule {name!r}: {key} = {value!r}; it must be True or False")


def group_factors(
    optimizer: torch.optim.Optimizer, name: str, *, total_steps: int, warmup_steps: int = 0, **options: Any
) -> list[Callable[[int], float]]:
    """`schedule`, one for each param group, for `LambdaLR`: where it has a `ratio`, the group's own `lr_ratio`.

    So groups of `optim.blockwise` end at one common rate under the blockwise schedules; under the others, and in
    groups without `lr_ratio`, every group's rate is multiplied alike.
    """
    own = "ratio" in schedule_options(name)
    return [
        schedule(
            name,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            **(options | ({"ratio": group["lr_ratio"]} if own and "lr_ratio" in group else {})),
        )
        for group in optimizer.param_groups
    ]
