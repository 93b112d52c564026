"""Learning-rate schedules: pure functions from the number of steps taken to a factor on the base learning rate.

    factor = schedule("cosine", total_steps=1000, warmup_steps=30)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

Closed forms, so that a resumed run has the same values. The factor at `step` is that of update number ``step + 1``;
from `total_steps` on every schedule holds its last value. Definitions: transformers' schedulers of the same names.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from optim.rules import did_you_mean


def linear(step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Up from 0 in `warmup_steps`, then in a straight line to `min_ratio` at `total_steps`."""
    if step < min(warmup_steps, total_steps):
        return step / warmup_steps
    return 1 + (min_ratio - 1) * _share(step, warmup_steps, total_steps)


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Up from 0 in `warmup_steps`, then half a cosine down to `min_ratio` at `total_steps`."""
    if step < min(warmup_steps, total_steps):
        return step / warmup_steps
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * _share(step, warmup_steps, total_steps))) / 2


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


def constant(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Up from 0 in `warmup_steps`, then 1."""
    return step / warmup_steps if step < min(warmup_steps, total_steps) else 1.0


def _share(step: int, start: int, end: int) -> float:
    """How much of start..end is done, 0 to 1; 1 from the end on, also where there is nothing between them."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0


SCHEDULES: dict[str, Callable[..., float]] = {"linear": linear, "cosine": cosine, "wsd": wsd, "constant": constant}


def schedule(name: str, *, total_steps: int, warmup_steps: int = 0, **options: Any) -> Callable[[int], float]:
    """The schedule of that name with its options bound: ``step -> factor``, for `torch.optim.lr_scheduler.LambdaLR`.

    total_steps, warmup_steps: optimizer steps. options: see the functions of `SCHEDULES`.
    Raises: ValueError for an unknown name or values out of range, TypeError for an option that the schedule does not
    have.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}{did_you_mean(name, SCHEDULES)}")
    known = set(inspect.signature(SCHEDULES[name]).parameters) - {"step"}
    for key in options:
        if key not in known:
            raise TypeError(f"schedule {name!r} has no option {key!r}{did_you_mean(key, known)}")
    for key, steps in {"total_steps": total_steps, "warmup_steps": warmup_steps, **options}.items():
        if key.endswith("_steps") and steps is not None and (type(steps) is not int or steps < 0):
            raise ValueError(f"schedule {name!r}: {key} = {steps!r}; it must be an integer of at least 0")
    if not 0 <= options.get("min_ratio", 0.0) <= 1:
        raise ValueError(f"schedule {name!r}: min_ratio = {options['min_ratio']!r}; it must be between 0 and 1")
    if options.get("decay", "linear") not in _DECAYS:
        hint = did_you_mean(str(options["decay"]), _DECAYS)
        raise ValueError(f"schedule {name!r}: decay = {options['decay']!r}{hint}")
    # a partial, not an object with fields: LambdaLR would put an object's fields into its state dict and restore them
    return partial(SCHEDULES[name], total_steps=total_steps, warmup_steps=warmup_steps, **options)
