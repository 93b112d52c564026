"""Answers swapped among rows, and how well low scores find those rows: the noise check of `audit --oracle`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import DataError
from pipelines.rows.row import Row


def swap(rows: Sequence[Row], share: float, seed: int) -> tuple[list[dict[str, Any]], set[int]]:
    """Return rows as JSON objects, some of them with the answer of another row.

    Args:
        rows: the rows.
        share: how many of those with a prompt and an answer get another answer.
        seed: which.

    Returns:
        The objects, and the places of those whose answer is not their own.

    Raises:
        DataError: Fewer than two rows have an answer that can be swapped.
    """
    able = [k for k, row in enumerate(rows) if row.text is None and "tool_calls" not in (row.messages or ({},))[-1]]
    many = max(2, round(share * len(rows)))
    if len(able) < 2:
        raise DataError("--oracle: no two rows have a prompt and an answer in text, so answers cannot be swapped")
    drawn = np.random.default_rng(seed).permutation(able)[:many].tolist()
    lines = [_line(row, row.answer) for row in rows]
    changed = set()
    for k, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        if rows[other].answer != rows[k].answer:
            lines[k] = _line(rows[k], rows[other].answer)
            changed.add(k)
    return lines, changed


def _line(row: Row, answer: str) -> dict[str, Any]:
    """A row as a JSON object of the usual formats, with this answer."""
    head: dict[str, Any] = {"dataset": row.source, "id": row.id}
    if row.text is not None:
        return head | {"text": row.text}
    if not row.messages:
        return head | {"prompt": row.prompt, "completion": answer}
    last = max(k for k, turn in enumerate(row.messages) if turn["role"] == "assistant")
    turns = [
        {**turn, **({"content": answer} if k == last else {}), **({"weight": 0} if k in row.masked else {})}
        for k, turn in enumerate(row.messages)
    ]
    tools = {"tools": list(row.tools)} if row.tools else {}
    settings = {"chat_template_kwargs": json.dumps(row.settings)} if row.settings else {}
    return head | {"messages": turns} | tools | settings


def detected(scores: NDArray[np.float64], swapped: NDArray[np.bool_]) -> dict[str, float]:
    """Measure how well low scores find the swapped rows.

    Args:
        scores: float64 [n].
        swapped: bool [n].

    Returns:
        `auc`, the chance that a swapped row has a lower score than another (ties count half), and `precision`, the
        share of swapped rows among as many lowest scores.

    Example:
        >>> detected(np.array([0.0, 1.0, 2.0, 3.0]), np.array([True, False, False, False]))
        {'auc': 1.0, 'precision': 1.0}
    """
    bad, good = scores[swapped], np.sort(scores[~swapped])
    if not len(bad) or not len(good):
        return {"auc": 0.5, "precision": float(len(bad) > 0)}
    above = len(good) - np.searchsorted(good, bad, side="right")
    level = np.searchsorted(good, bad, side="right") - np.searchsorted(good, bad, side="left")
    lowest = np.argsort(scores, kind="stable")[: len(bad)]
    auc = float((above + level / 2).sum() / (len(bad) * len(good)))
    return {"auc": auc, "precision": float(swapped[lowest].mean())}
