"""Common candidates for an order: batches sorted by a value, and sources one after the other or interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def curricula(
    sequence: Sequence[int], values: Mapping[str, Sequence[float]], sources: Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Build common candidates: batches sorted by each value, both ways; sources one after the other, and interleaved.

    Args:
        sequence: the reference order.
        values: name -> one number per batch.
        sources: the source of each batch.

    Returns:
        Name -> a permutation of `sequence`; ties keep the order of the sequence.

    Example:
        >>> curricula([0, 1, 2], {"length": [30, 10, 20]})
        {'length, rising': (1, 2, 0), 'length, falling': (0, 2, 1)}

    """
    made: dict[str, tuple[int, ...]] = {}
    for name, numbers in values.items():
        rising = sorted(sequence, key=lambda b: numbers[b])
        made[f"{name}, rising"] = tuple(rising)
        made[f"{name}, falling"] = tuple(reversed(rising))
    if sources is not None and len(set(sources)) > 1:
        names = list(dict.fromkeys(sources[b] for b in sequence))
        blocks = {name: [b for b in sequence if sources[b] == name] for name in names}
        made["sources, one by one"] = tuple(b for name in names for b in blocks[name])
        made["sources, one by one, reversed"] = made["sources, one by one"][::-1]
        turns: list[tuple[float, int, int]] = []
        for number, name in enumerate(names):  # each source is spread evenly over the run
            turns += [((i + 0.5) / len(blocks[name]), number, b) for i, b in enumerate(blocks[name])]
        made["sources, interleaved"] = tuple(b for _, _, b in sorted(turns, key=lambda turn: turn[:2]))
    return made
