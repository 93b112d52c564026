"""Held-out rows that also occur in the pool, among the target rows, or in the selection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.rows.dedup import overlaps
from pipelines.rows.rows import Rows

_SHOWN = 3


def find(
    test: Rows, others: Mapping[str, tuple[Rows, Iterable[int] | None]], *, near: float | None = None
) -> list[dict[str, Any]]:
    """Find test rows that also occur among other rows.

    Rows repeat each other as defined by `dedup`: exactly, or nearly if `near` is given.

    Args:
        test: The test rows.
        others: Name -> (rows, which of them); None means all usable rows.
        near: The threshold of near-duplicates.

    Returns:
        For each of `others` that repeats test rows: {"where": its name, "rows": the number of test rows, "of": the
        number of all test rows, "examples": ["test.jsonl:3 is pool.jsonl:8"]}.
    """
    found = []
    for name, (rows, among) in others.items():
        how, threshold = ("exact", 0.8) if near is None else ("near", near)
        pairs = overlaps(test.pool, test.scan, rows.pool, rows.scan, how, threshold, among)
        if pairs:
            examples = [f"{test.pool.where(i)} is {rows.pool.where(j)}" for i, j in list(pairs.items())[:_SHOWN]]
            found.append({"where": name, "rows": len(pairs), "of": int(test.usable.sum()), "examples": examples})
    return found


def sentence(found: Sequence[Mapping[str, Any]], what: str = "test rows") -> str:
    """Return a sentence such as `3 of 60 test rows are also in the pool (test.jsonl:3 is pool.jsonl:8)`.

    Args:
        found: The result of `find`.
        what: The name of the rows.
    """
    return "; ".join(
        f"{one['rows']} of {one['of']} {'' if k else f'{what} are also '}in the {one['where']} "
        f"({', '.join(one['examples'])})"
        for k, one in enumerate(found)
    )
