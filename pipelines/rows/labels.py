"""Which tokens of a text have loss: those that overlap its spans, found by the offsets of the tokenizer."""

from collections.abc import Sequence

import numpy as np

from pipelines.rows.encoded import IGNORED


def labels_of(ids: list[int], offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Return the ids of tokens that overlap a span (start, end) of characters, and `IGNORED` for the others.

    Some tokenizers exclude white space from their offsets. A token of white space then has an empty interval at its
    end and represents the gap before it. If there is no gap, the token is an extra one that a normaliser made, and it
    belongs to the character before it. The cost is linear.

    Args:
        ids: The tokens.
        offsets: (start, end) of each.
        spans: The spans, in order and without overlaps.
    """
    if not ids or not spans:
        return [IGNORED] * len(ids)
    start, end = np.asarray(offsets, np.int64).T
    if (start == end).any() or (start[1:] < start[:-1]).any():
        return _one_by_one(ids, offsets, spans)
    edges = np.asarray(spans, np.int64)
    span = np.searchsorted(edges[:, 1], start, side="right")  # the first that ends after the token starts
    inside = span < len(edges)
    inside[inside] = edges[span[inside], 0] < end[inside]
    return [token if trained else IGNORED for token, trained in zip(ids, inside.tolist(), strict=True)]


def _one_by_one(ids: list[int], offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORED] * len(ids)
    reached = s = 0
    for t, (start, end) in enumerate(offsets):
        if start == end:
            start = min(start, reached) if reached != end else max(0, end - 1)
        reached = max(reached, end)
        while s < len(spans) and spans[s][1] <= start:
            s += 1
        if s == len(spans):
            break
        if spans[s][0] < end:
            labels[t] = ids[t]
    return labels
