"""Orders from any score: rows or batches sorted by it, then folded into a shape, and shuffled within windows.

Every shape is a rearrangement of the sorted places 0..n-1:

    sort     0, 1, ..., n - 1
    reverse  n - 1, ..., 0
    fold     every L-th place, L times: 0, L, 2 L, ...; then 1, L + 1, ...: the range of scores is passed L times
    zigzag   as fold, but every second pass goes down, so that scores never jump
    stair    sorted; around each boundary of K sections, the places within `ratio` n of it are folded
    saw      as stair, with a zigzag around each boundary

Fold and zigzag return to easy rows against forgetting; stair and saw do so only where sections meet and keep the easy
beginning and the hard end. A shuffle within windows of W places makes batches diverse again and changes the shape by
less than W places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datatools.errors import UsageError, did_you_mean
from datatools.stats import Numbers


@dataclass(frozen=True)
class Form:
    """The numbers of a shape.

    Args:
        layers: L, the passes of a fold or zigzag.
        sections: K, the sections of a stair or saw.
        ratio: half width of the transition between sections, as a share of all places.
        window: W, within which places are shuffled in the end; 0 does not shuffle.

    Raises:
        UsageError: if a number is out of range.

    Example:
        >>> Form(layers=2).layers
        2

    """

    layers: int = 3
    sections: int = 3
    ratio: float = 0.1
    window: int = 0

    def __post_init__(self) -> None:
        if self.layers < 1 or self.sections < 1 or self.window < 0 or not 0 <= self.ratio <= 0.5:
            raise UsageError(
                f"order: layers={self.layers}, sections={self.sections}, ratio={self.ratio}, window={self.window}; "
                "expected layers and sections of 1 or more, a ratio from 0 to 0.5, and a window of 0 or more"
            )


def _sort(n: int, form: Form) -> list[int]:
    """Low scores first."""
    return list(range(n))


def _reverse(n: int, form: Form) -> list[int]:
    """High scores first."""
    return list(range(n))[::-1]


def _fold(n: int, form: Form) -> list[int]:
    """Several passes from low to high scores."""
    return [place for layer in range(form.layers) for place in range(layer, n, form.layers)]


def _zigzag(n: int, form: Form) -> list[int]:
    """Several passes through the scores, up and down in turns."""
    passes = [list(range(layer, n, form.layers)) for layer in range(form.layers)]
    return [place for layer, one in enumerate(passes) for place in (one[::-1] if layer % 2 else one)]


def _stair(n: int, form: Form) -> list[int]:
    """Low scores first, with a fold where sections meet."""
    return _transitions(n, form, _fold)


def _saw(n: int, form: Form) -> list[int]:
    """Low scores first, with a zigzag where sections meet."""
    return _transitions(n, form, _zigzag)


def _transitions(n: int, form: Form, shape: Callable[[int, Form], list[int]]) -> list[int]:
    made: list[int] = []
    radius = round(n * form.ratio)
    for section in range(1, form.sections):
        middle = round(n * section / form.sections)
        first, last = max(len(made), middle - radius), min(n, middle + radius)
        made += range(len(made), first)
        made += [first + place for place in shape(max(0, last - first), form)]
    return made + list(range(len(made), n))


SHAPES: dict[str, Callable[[int, Form], list[int]]] = {
    "sort": _sort,
    "reverse": _reverse,
    "fold": _fold,
    "zigzag": _zigzag,
    "stair": _stair,
    "saw": _saw,
}
"""Name -> the places of n sorted items in the shape."""


def arrange(scores: Numbers, shape: str = "sort", *, form: Form | None = None, seed: int = 0) -> list[int]:
    """Arrange items by their scores in a shape.

    Args:
        scores: one finite number per item [n].
        shape: a name of `SHAPES`.
        form: the numbers of the shape; by default those of `Form`.
        seed: seed of the shuffle within windows.

    Returns:
        The numbers of the items, in order; equal scores keep their order.

    Raises:
        UsageError: if the shape is unknown, or a score is not finite; the message names the item.

    Source:
        Demystifying data organization, arXiv 2605.30334, and its code (microsoft/data-efficacy); stair is STR there.

    Example:
        >>> arrange([5.0, 1.0, 3.0, 2.0, 4.0], "zigzag", form=Form(layers=2))
        [1, 2, 0, 4, 3]

    """
    form = form or Form()
    if shape not in SHAPES:
        raise UsageError(f"order: unknown shape {shape!r}{did_you_mean(shape, SHAPES)}")
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(wrong := np.flatnonzero(~np.isfinite(values))):
        raise UsageError(f"order: the score of item {wrong[0]} is {values[wrong[0]]}; every item needs a finite score")
    ranked = np.argsort(values, kind="stable")
    places = SHAPES[shape](len(values), form)
    return shuffled(ranked[np.asarray(places, dtype=np.int64)].tolist(), form.window, seed)


def shuffled(items: Sequence[int], window: int, seed: int) -> list[int]:
    """Shuffle items within consecutive windows.

    Args:
        items: the items, in order.
        window: items per window; 0 or 1 does not shuffle.
        seed: seed of the shuffle.

    Returns:
        The items.

    Example:
        >>> sorted(shuffled([1, 2, 3, 4], 2, seed=0)[:2])
        [1, 2]

    """
    if window < 2:
        return list(items)
    rng = np.random.default_rng(seed)
    parts = [list(items[lo : lo + window]) for lo in range(0, len(items), window)]
    return [part[i] for part in parts for i in rng.permutation(len(part))]


def positions(count: int, batch_size: int, rank: int, world: int) -> list[int]:
    """Find the places of an order that one of several processes trains on, a batch of each group of `world` batches.

    Places from the start fill up the last group, so that all processes take equally many steps.

    Args:
        count: items of the order.
        batch_size: items of a batch of one process.
        rank: number of the process.
        world: number of processes.

    Returns:
        The places.

    Example:
        >>> positions(6, batch_size=2, rank=1, world=2)
        [2, 3, 0, 1]

    """
    group = batch_size * world
    whole = math.ceil(count / group) * group
    return [place % count for place in range(whole) if place // batch_size % world == rank]
