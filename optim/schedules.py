"""Learning-rate schedules: pure functions from the number of steps taken to a factor of the base learning rate.

    factor = schedule("cosine", total_steps=1000, warmup_steps=30)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

All of them are closed forms, so that a resumed run has the same values. The factor at `step` is that of update number
``step + 1``; from `total_steps` on, every schedule keeps its last value. `linear`, `cosine`, `wsd` and `constant` are
defined like transformers' schedulers of the same names. `group_factors` serves groups with different learning rates.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from optim.curves import (
    DECAYS,
    blockwise_cosine,
    blockwise_wsd,
    constant,
    cosine,
    linear,
    one_cycle,
    polynomial,
    rex,
    uba,
    wsd,
)
from optim.unknown import did_you_mean

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

_SHAPES = {"decay": tuple(DECAYS), "anneal": ("cosine", "linear")}


def schedule(name: str, *, total_steps: int, warmup_steps: int = 0, **options: Any) -> Callable[[int], float]:
    """Return the schedule of that name with its options bound, for `torch.optim.lr_scheduler.LambdaLR`.

    Args:
        name: A key of `SCHEDULES`.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps of the warm-up.
        **options: The keywords of the function in `SCHEDULES`.

    Returns:
        A function from the number of steps taken to the factor.

    Raises:
        ValueError: For an unknown name or values out of range.
        TypeError: For an option that the schedule does not have (`one_cycle` has no `warmup_steps`, because it rises
            by itself).

    Example:
        >>> from optim import SGD, schedule
        >>> optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("linear", total_steps=4))
        >>> optimizer.step(); scheduler.step()
        >>> round(optimizer.param_groups[0]["lr"], 3)
        0.075
    """
    known = schedule_options(name)
    given = {"total_steps": total_steps, **options}
    if warmup_steps != 0 or "warmup_steps" in known:
        given["warmup_steps"] = warmup_steps
    for key, value in given.items():
        if key not in known:
            raise TypeError(f"schedule {name!r} has no option {key!r}{did_you_mean(key, known)}")
        _check(name, key, value)
    # a partial, because LambdaLR would save the fields of an object in its state dict and restore them
    return partial(SCHEDULES[name], **given)


def schedule_options(name: str) -> set[str]:
    """Return the keywords that the schedule of that name takes.

    Args:
        name: A key of `SCHEDULES`.

    Raises:
        ValueError: For an unknown name.

    Returns:
        The names of the keywords, except `step`.

    Example:
        >>> from optim import schedule_options
        >>> sorted(schedule_options("rex"))
        ['d', 'min_ratio', 'total_steps', 'warmup_steps']
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}{did_you_mean(name, SCHEDULES)}")
    return set(inspect.signature(SCHEDULES[name]).parameters) - {"step"}


def _check(name: str, key: str, value: Any) -> None:
    """Raise a ValueError if the option cannot have this value."""
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
    """Return one schedule per param group, for `LambdaLR`; if it has a `ratio`, that is the group's `lr_ratio`.

    Under the blockwise schedules, the groups of `optim.blockwise` end at the same rate. Under other schedules, and in
    groups without `lr_ratio`, every group's rate is multiplied by the same factor.

    Args:
        optimizer: The optimizer.
        name: A key of `SCHEDULES`.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps of the warm-up.
        **options: As for `schedule`.

    Returns:
        A function from the number of steps taken to the factor, for each param group.

    Example:
        >>> from optim import SGD, group_factors
        >>> optimizer = SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.2, "lr_ratio": 2.0}], lr=0.1)
        >>> [factor(10) for factor in group_factors(optimizer, "blockwise_cosine", total_steps=10)]
        [0.025]
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
