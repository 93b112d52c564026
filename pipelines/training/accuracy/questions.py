"""What held-out rows offer to be judged by: a gold answer, options, tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from datatools import DataError
from pipelines.rows.row import Row
from pipelines.rows.rows import Rows
from pipelines.training.accuracy.extract import after_reasoning, normalised

MOST_OPTIONS = 32
"""Distinct answers up to which rows count as classification."""
FEWEST_ROWS = 3
"""Rows per distinct answer, on average, from which rows count as classification."""
LONGEST_OPTION = 200
"""Characters of an answer that may be one of a few classes."""


@dataclass(frozen=True)
class Question:
    """One row that can be asked.

    Attributes:
        index: its row.
        row: the row, cut after its last answer turn, whose earlier answers are context only.
        gold: the gold answer: the row's `answer` column (or `gold`, if `--columns` names one), else the answer turn.
        given: whether a column gives it.
        options: what the answer may be, as answer turns; empty where nothing says.
        right: the option that is right.
        tests: assertions for generated code.
    """

    index: int
    row: Row
    gold: str
    given: bool
    options: tuple[str, ...] = ()
    right: int = 0
    tests: tuple[str, ...] = ()

    @property
    def turn(self) -> str:
        """What the answer turn says."""
        return self.row.answer


def questions(rows: Rows, others: Iterable[Rows] = ()) -> list[Question]:
    """Return the usable rows that can be asked, in order; plain text and tool calls cannot.

    A row has options when its column `options` lists them, or when the answers of its rows, those of `others` (the
    target) included, are a few strings that repeat. Subtasks have options of their own, but those with one answer each
    are taken together: there the subtask is the answer.

    Args:
        rows: The held-out rows.
        others: Rows of the same kind, whose answers count.

    Raises:
        DataError: A column `options`, `answer` or `tests` cannot be read; names the row.
    """
    found = [asked for index in np.flatnonzero(rows.usable).tolist() if (asked := _question(rows, index)) is not None]
    more = [
        asked
        for other in others
        for index in np.flatnonzero(other.usable).tolist()
        if (asked := _question(other, index)) is not None
    ]
    classes = _classes([*found, *more])
    result = []
    for asked in found:
        group = classes.get(_group(asked, classes))
        if not asked.options and group is not None and _said(asked, group[0]) in group[1]:
            asked = replace(asked, options=group[1], right=group[1].index(_said(asked, group[0])))
        result.append(asked)
    return result


def _question(rows: Rows, index: int) -> Question | None:
    row = _cut(rows.pool[index])
    if row is None:
        return None
    columns, where = rows.pool.given(index), rows.pool.where(index)
    gold = columns.get("gold")
    gold = columns.get("answer") if gold is None else gold
    if isinstance(gold, list) and len(gold) == 1:
        gold = gold[0]
    answer = after_reasoning(row.answer).strip() or row.answer
    given = isinstance(gold, str | int | float) and not isinstance(gold, bool) and str(gold).strip() != ""
    tests = columns.get("tests")
    if tests is not None and not (isinstance(tests, str) or _texts(tests)):
        raise DataError(f"{where}: the column of tests holds {_shown(tests)}; expected a text or a list of texts")
    asked = Question(
        index,
        row,
        str(gold) if given else answer,
        given,
        tests=(tests,) if isinstance(tests, str) else tuple(tests or ()),
    )
    options, labels = _options(columns.get("options"), where)
    if not options:
        return asked
    return replace(asked, options=options, right=_right(gold if given else answer, options, labels, where))


def _cut(row: Row) -> Row | None:
    """The row up to its last answer turn, with loss on that alone; None where there is no text to ask for."""
    if row.text is not None:
        return None
    if not row.messages:
        return row
    last = max(k for k, turn in enumerate(row.messages) if turn["role"] == "assistant")
    turn = row.messages[last]
    if "tool_calls" in turn or not turn["content"].strip():
        return None
    earlier = frozenset(k for k, each in enumerate(row.messages[:last]) if each["role"] == "assistant")
    return replace(row, messages=row.messages[: last + 1], masked=earlier)


def answered(row: Row, text: str) -> Row:
    """Return a row with another last answer and without its reasoning, which led to the old one.

    Args:
        row: The row.
        text: The answer.
    """
    if not row.messages:
        return replace(row, completion=text)
    return replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": text}))


# ------------------------------------------------------------------------------------------------- columns of options


def _options(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and labels of a column of options: a list, or {"text": [...], "label": [...]}, or label -> text."""
    if value is None or value in ([], {}):
        return (), ()
    labels: Any = None
    if isinstance(value, Mapping):
        value, labels = (value["text"], value.get("label")) if "text" in value else (list(value.values()), list(value))
    if isinstance(value, list):  # tables fill up the shorter ones with nulls
        value = value[: max((k + 1 for k, one in enumerate(value) if one is not None), default=0)]
        labels = labels[: len(value)] if isinstance(labels, list) else labels
    if not _texts(value) or len(value) < 2 or len(set(value)) < len(value):
        raise DataError(f"{where}: the column of options holds {_shown(value)}; expected two or more different texts")
    labels = [str(label) for label in labels] if isinstance(labels, list) and len(labels) == len(value) else []
    return tuple(value), tuple(labels)


def _right(gold: Any, options: Sequence[str], labels: Sequence[str], where: str) -> int:
    """The place of the right option: `gold` is its text, its label, its number (counted from 0), or its letter.

    Labels come before numbers: with the labels "1" to "4", the answer 1 is the first option.
    """
    gold = int(gold) if isinstance(gold, float) and gold.is_integer() else gold  # of a column with missing numbers
    said = str(gold).strip()
    text, plain, names = normalised(said), [normalised(one) for one in options], [normalised(one) for one in labels]
    same = [k for k, one in enumerate(options) if one.strip() == said]
    same = same or [k for k, one in enumerate(plain) if one == text]
    if len(same) > 1:
        raise DataError(f"{where}: the answer {_shown(gold)} may be several of the options; write it as one of them")
    by_text = same[0] if same else None
    by_name = names.index(text) if names.count(text) == 1 else None
    if by_name is None and isinstance(gold, int) and 0 <= gold < len(options):
        by_name = gold
    if by_text is not None and by_name is not None and by_text != by_name:
        raise DataError(
            f"{where}: the answer {gold} is the text of one option and the number of another, or its label; write it "
            "as a text, or write the option's letter"
        )
    if by_text is not None or by_name is not None:
        return by_text if by_text is not None else int(by_name or 0)
    if len(text) == 1 and 0 <= ord(text) - ord("a") < len(options):
        return ord(text) - ord("a")
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    raise DataError(
        f"{where}: the answer {_shown(gold)} is none of the {len(options)} options; expected the text of one, its "
        "letter, or its number counted from 0"
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ----------------------------------------------------------------------------------------------------- classification

Group = tuple[bool, tuple[str, ...]]
"""Whether the answers are those of the column, not the turns; and the distinct answers, sorted."""


def _classes(asked: Sequence[Question]) -> dict[str | None, Group]:
    """The options of each subtask whose answers are a few strings; None is all subtasks that have one answer each."""
    groups: dict[str | None, list[Question]] = defaultdict(list)
    for one in asked:
        groups[one.row.subtask].append(one)
    named = [name for name in groups if name is not None]
    single = [name for name in named if len({one.turn for one in groups[name]}) == 1]
    if single:
        groups[None] += [one for name in single for one in groups.pop(name)]
    found = {}
    for name, members in groups.items():
        for column in (False, True):
            answers = sorted({_said(one, column) for one in members})
            few = 2 <= len(answers) <= min(MOST_OPTIONS, len(members) / FEWEST_ROWS)
            short = all(len(answer) <= LONGEST_OPTION for answer in answers)
            if few and short and (not column or all(one.given for one in members)):
                found[name] = (column, tuple(answers))
                break
    return found


def _group(asked: Question, classes: Mapping[str | None, Group]) -> str | None:
    return asked.row.subtask if asked.row.subtask in classes else None


def _said(asked: Question, column: bool) -> str:
    return asked.gold if column else asked.turn
