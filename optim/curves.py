"""The formulas of the learning-rate schedules: pure functions from the number of steps taken to a factor.

In the formulas, x is the completed share of the steps after the warm-up, from 0 to 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


def linear(step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Rise from 0 over `warmup_steps`, then fall on a straight line to `min_ratio` at `total_steps`.

        f = 1 - (1 - min_ratio) x

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        min_ratio: The last factor.

    Returns:
        The factor of the base learning rate.

    Example:
        >>> from optim.curves import linear
        >>> [linear(step, total_steps=4) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _warmed(step, total_steps, warmup_steps, lambda x: 1 + (min_ratio - 1) * x)


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> float:
    """Rise from 0 over `warmup_steps`, then fall on half a cosine to `min_ratio` at `total_steps`.

        f = min_ratio + (1 - min_ratio) (1 + cos(pi x)) / 2

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        min_ratio: The last factor.

    Returns:
        The factor of the base learning rate.

    Example:
        >>> from optim.curves import cosine
        >>> [round(cosine(step, total_steps=5, warmup_steps=1), 3) for step in range(6)]
        [0.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return _warmed(
        step, total_steps, warmup_steps, lambda x: min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * x)) / 2
    )


DECAYS: dict[str, Callable[[float], float]] = {
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
    """Rise from `min_ratio` over `warmup_steps`, stay at 1, and fall to `min_ratio` over the last `decay_steps`.

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        decay_steps: Steps of the fall; a fifth of `total_steps` by default, and at most what the warm-up leaves.
        decay: The shape of the fall, "linear", "cosine" or "1-sqrt" (1 - sqrt(x), with x the share of the fall).
        min_ratio: The first and the last factor.

    Returns:
        The factor of the base learning rate.

    Example:
        >>> from optim.curves import wsd
        >>> [wsd(step, total_steps=5, decay_steps=2, decay="linear") for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if step < min(warmup_steps, total_steps):
        return min_ratio + (1 - min_ratio) * step / warmup_steps
    length = total_steps // 5 if decay_steps is None else decay_steps
    start = max(total_steps - length, warmup_steps)
    return min_ratio + (1 - min_ratio) * DECAYS[decay](_share(step, start, total_steps))


def polynomial(
    step: int, *, total_steps: int, warmup_steps: int = 0, power: float = 2.0, min_ratio: float = 0.0
) -> float:
    """Rise from 0 over `warmup_steps`, then fall to `min_ratio` as a power of the remaining share of the steps.

        f = min_ratio + (1 - min_ratio) (1 - x)^power

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        power: The exponent; 1 is `linear`.
        min_ratio: The last factor.

    Returns:
        The factor of the base learning rate.

    Example:
        >>> from optim.curves import polynomial
        >>> [polynomial(step, total_steps=4) for step in range(5)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    return _warmed(step, total_steps, warmup_steps, lambda x: min_ratio + (1 - min_ratio) * math.pow(1 - x, power))


def rex(step: int, *, total_steps: int, warmup_steps: int = 0, d: float = 0.5, min_ratio: float = 0.0) -> float:
    """Rise from 0 over `warmup_steps`, then fall to `min_ratio` on a hyperbola, slowly at first.

        f = min_ratio + (1 - min_ratio) z / ((1 - d) + d z),  z = 1 - x

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        d: 0 is `linear`. The closer it is to 1, the longer the factor stays high (with 1/2 it is two thirds of the
            peak at half time).
        min_ratio: The last factor.

    Returns:
        The factor of the base learning rate.

    Source:
        Chen et al. 2021, arXiv 2107.04197, where d = 1/2 and there is no warm-up.

    Differs:
        The most copied code, REX_LR, has d = 0.9 and starts again at `total_steps`.

    Example:
        >>> from optim.curves import rex
        >>> [round(rex(step, total_steps=4), 3) for step in range(5)]
        [1.0, 0.857, 0.667, 0.4, 0.0]
    """

    def fall(x: float) -> float:
        left = 1 - x
        return min_ratio + (1 - min_ratio) * left / ((1 - d) + d * left)

    return _warmed(step, total_steps, warmup_steps, fall)


def uba(step: int, *, total_steps: int, warmup_steps: int = 0, phi: float = 1.0, min_ratio: float = 0.0) -> float:
    """Rise from 0 over `warmup_steps`, then fall on the unified budget-aware curve to `min_ratio`.

        f = min_ratio + (1 - min_ratio) 2 c / (2 phi + (2 - phi) c),  c = 1 + cos(pi x)

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        phi: A number above 0. 2 is `cosine`; with smaller values the factor stays high longer, and with larger ones it
            falls earlier. The default 1 is our choice; tune it (try 0.5, 1, 2, 5).
        min_ratio: The last factor.

    Returns:
        The factor of the base learning rate.

    Source:
        arXiv 2505.24452 (unified budget-aware schedule). Unverified: no official code was found. The formula is that of
        a public re-implementation, which restricts phi to (0, 2] and has no warm-up. The paper's form with several
        phases, its recommendation of phi for each optimizer and its results could not be checked.

    Example:
        >>> from optim.curves import uba
        >>> [round(uba(step, total_steps=4, phi=2.0), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
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
    """Rise from 1 / div_factor over the first `pct_start`, then fall to 1 / (div_factor final_div_factor).

    The schedule has its own warm-up. Its momentum is `one_cycle_momentum`.

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        pct_start: The share of the steps in which the factor rises.
        div_factor: The reciprocal of the first factor.
        final_div_factor: The first factor divided by the last one.
        anneal: The shape of each piece, "cosine" or "linear".
        three_phase: Whether the factor first falls to 1 / div_factor in as many steps as it rose, and then further.

    Returns:
        The factor of the base learning rate.

    Source:
        Smith & Topin, arXiv 1708.07120; `torch.optim.lr_scheduler.OneCycleLR` of ``total_steps + 1`` steps, which
        raises an error after its end.

    Example:
        >>> from optim.curves import one_cycle
        >>> [round(one_cycle(step, total_steps=4, pct_start=0.4, anneal="linear"), 3) for step in range(5)]
        [0.04, 1.0, 0.667, 0.333, 0.0]
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
    """Return the momentum that mirrors `one_cycle`: it falls from `max_momentum` as the rate rises, and then rises.

    The value is not a factor and the function is not in `SCHEDULES`. It is meant for training loops that set the
    momentum (or the first beta) of an optimizer.

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        base_momentum: The lowest momentum.
        max_momentum: The first and the last momentum.
        pct_start: As in `one_cycle`.
        anneal: As in `one_cycle`.
        three_phase: As in `one_cycle`.

    Returns:
        The momentum.

    Example:
        >>> from optim.curves import one_cycle_momentum
        >>> [round(one_cycle_momentum(step, total_steps=4, pct_start=0.4), 3) for step in (0, 1, 4)]
        [0.95, 0.85, 0.95]
    """
    phase = _one_cycle_phase(step, total_steps, pct_start, anneal, three_phase)
    height = 0.0 if phase.number == 2 else phase.height
    return max_momentum + (base_momentum - max_momentum) * height


class _Phase(NamedTuple):
    number: int
    height: float  # 0 at the low end of the phase, 1 at its high end


def _one_cycle_phase(step: int, total_steps: int, pct_start: float, anneal: str, three_phase: bool) -> _Phase:
    """Return the phase of a step: 0 is the rise, 1 the fall, 2 the tail of `three_phase`. They end as in torch."""
    peak = min(max(pct_start * (total_steps + 1) - 1, 0.0), total_steps)
    low = min(2 * peak, total_steps) if three_phase else total_steps
    if step < peak:
        return _Phase(0, 1 - DECAYS[anneal](_share(step, 0, peak)))
    if step < low or not three_phase:
        return _Phase(1, DECAYS[anneal](_share(step, peak, low)))
    return _Phase(2, DECAYS[anneal](_share(step, low, total_steps)))


def blockwise_cosine(
    step: int, *, total_steps: int, warmup_steps: int = 0, ratio: float = 1.0, min_ratio: float = 0.05
) -> float:
    """Follow `cosine` for a block with `ratio` times the base rate; all blocks end at the same rate.

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        ratio: The block's rate divided by the base rate.
        min_ratio: The last rate of all blocks divided by the base rate.

    Returns:
        The factor of the block's learning rate.

    Source:
        arXiv 2502.19002, whose scripts end at base / 20 (base / 10 on C4).

    Differs:
        The scripts' `alpha` multiplies a block's peak and warm-up; set the ratio and `warmup_steps` instead.

    Example:
        >>> from optim.curves import blockwise_cosine
        >>> [2.0 * blockwise_cosine(4, total_steps=4, ratio=2.0), blockwise_cosine(4, total_steps=4, ratio=1.0)]
        [0.05, 0.05]
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
    """Rise from 0, stay at 1 until two thirds of the run, and fall linearly; all blocks end at the same rate.

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.
        ratio: The block's rate divided by the base rate.
        min_ratio: The last rate of all blocks divided by the base rate.
        gamma: The factor until one third of the run; from there to two thirds it changes linearly to 1.

    Returns:
        The factor of the block's learning rate.

    Source:
        The WSD script of arXiv 2502.19002.

    Differs:
        There is no `alpha`, as in `blockwise_cosine`. A warm-up that is longer than two thirds of the run is followed
        directly by the decay.

    Example:
        >>> from optim.curves import blockwise_wsd
        >>> [round(blockwise_wsd(step, total_steps=6), 2) for step in range(7)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]
    """
    if step < min(warmup_steps, total_steps):
        return gamma * step / warmup_steps
    first, second = int(total_steps / 3), int(total_steps * 2 / 3)
    if step < second:
        return gamma + (1 - gamma) * _share(step, first, second)
    floor = min(min_ratio / ratio, 1.0)
    return 1 + (floor - 1) * _share(step, max(second, warmup_steps), total_steps)


def constant(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Rise from 0 over `warmup_steps`, then stay at 1.

    Args:
        step: Steps taken so far.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise.

    Returns:
        The factor of the base learning rate.

    Example:
        >>> from optim.curves import constant
        >>> [constant(step, total_steps=3, warmup_steps=2) for step in range(4)]
        [0.0, 0.5, 1.0, 1.0]
    """
    return _warmed(step, total_steps, warmup_steps, lambda _: 1.0)


def _warmed(step: int, total_steps: int, warmup_steps: int, fall: Callable[[float], float]) -> float:
    """Rise from 0 over `warmup_steps`, then follow `fall` of the completed share of the remaining steps."""
    if step < min(warmup_steps, total_steps):
        return step / warmup_steps
    return fall(_share(step, warmup_steps, total_steps))


def _share(step: float, start: float, end: float) -> float:
    """Return the completed share of start..end, from 0 to 1; it is 1 from the end on, even if the range is empty."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0
