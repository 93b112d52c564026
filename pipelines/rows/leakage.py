"""Held-out rows that were seen before: in the pool, among the target rows, in the selection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.rows.dedup import overlaps
from pipelines.rows.rows import Rows

_SHOWN = 3


def find(
    test: Rows, others: Mapping[str, tuple[Rows, Iterable[int] | None]], *, near: float | None = None
) -> list[dict[str, Any]]:
    """For each of `others` (name -> rows, and which of them; None: all usable) that repeats test rows: what and where.

    Rows repeat each other as `dedup` says: exactly, or with `near` (a threshold) nearly.
    Returns: {"where": name, "rows": how many test rows, "of": all, "examples": ["test.jsonl:3 is pool.jsonl:8"]}.
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
    """`3 of 60 test rows are also in the pool (test.jsonl:3 is pool.jsonl:8); 1 of 60 in the selection (...)`."""
    return "; ".join(
        f"{one['rows']} of {one['of']} {'' if k else f'{what} are also '}in the {one['where']} "
        f"({', '.join(one['examples'])})"
        for k, one in enumerate(found)
    )
