"""Rows grouped into batches of bounded size."""

from __future__ import annotations

from collections.abc import Sequence


def token_batches(lengths: Sequence[int], budget: int, *, padding: float = 0.125) -> list[list[int]]:
    """Indices of rows grouped so that padded tokens (longest row x rows) stay within `budget`, longest rows first.

    A batch is also closed before more than the share `padding` of it would be padding: on a CPU a padded token costs as
    much as a real one. A row longer than the budget is a batch of its own. The order is fixed by (length, index), so
    the batches, and with them every bit of the result, do not depend on anything else.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    real = 0  # tokens in the last batch
    for i in order:
        if batches:
            area = lengths[batches[-1][0]] * (len(batches[-1]) + 1)
            if area <= budget and area - real - lengths[i] <= padding * area:
                batches[-1].append(i)
                real += lengths[i]
                continue
        batches.append([i])
        real = lengths[i]
    return batches
