"""The table of row formats: which format a row has, and how the row is read by it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.rows.formats.alpaca import ALPACA
from pipelines.rows.formats.calls import settings_in, tools_in
from pipelines.rows.formats.columns import ANY_FORMAT, Columns
from pipelines.rows.formats.columns import check_columns as _check_columns
from pipelines.rows.formats.loss_marks import with_lists
from pipelines.rows.formats.media import media_flags
from pipelines.rows.formats.messages import MESSAGES
from pipelines.rows.formats.preference import PREFERENCE
from pipelines.rows.formats.prompt_completion import PROMPT_COMPLETION
from pipelines.rows.formats.question_answer import QUESTION_ANSWER
from pipelines.rows.formats.record import Format, Given, WrongColumns
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.sharegpt import SHAREGPT
from pipelines.rows.formats.text import TEXT
from pipelines.rows.jsonl import Malformed, shown

FORMATS: dict[str, Format] = {
    "messages": MESSAGES,
    "preference": PREFERENCE,
    "sharegpt": SHAREGPT,
    "prompt_completion": PROMPT_COMPLETION,
    "alpaca": ALPACA,
    "text": TEXT,
    "question_answer": QUESTION_ANSWER,
}
"""Name -> format, in the order in which a row is compared with them."""


def column_names() -> tuple[str, ...]:
    """Return our names of columns, which a `columns` mapping may translate to the data's."""
    names = dict.fromkeys(
        name
        for known in FORMATS.values()
        for name in (*(column for columns in known.columns for column in columns), *known.optional)
    )
    return (*names, *(name for name in ANY_FORMAT if name not in names))


def check_columns(columns: Columns | None) -> dict[str, str | dict[str, str]]:
    """Check the names of a `columns` mapping against those of all formats.

    Args:
        columns: Our names -> the data's, also per file.

    Returns:
        The mapping.

    Raises:
        UsageError: One of our names is unknown; the message gives the nearest known one.
    """
    return _check_columns(columns, column_names())


def read_shape(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None, preference: str | None = None
) -> Shape:
    """Return the content of a row by the format that its columns show.

    Args:
        row: The JSON object.
        columns: Our names of columns -> the data's, if they differ.
        preference: Which answer of a row with `chosen` and `rejected` is the answer ("chosen"); None refuses such
            rows.

    Raises:
        Malformed: The row has no known format (then `WrongColumns`), or it is not fit to train on.
    """
    given = Given(row, columns or {}, preference)
    known, mine = detect(row, given.names)
    tools = tools_in(given)
    shape = with_lists(row, known.read(given, mine), tuple(given.names.values()))
    if tools and not shape.messages:
        raise Malformed("tools", "the row defines tools, which only a conversation (messages) can use")
    settings = settings_in(given) if shape.messages else {}
    return replace(shape, tools=tools, settings=settings, flags=(*shape.flags, *media_flags(row, shape)))


def detect(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Format, tuple[str, ...]]:
    """Return the format of a row, and which set of its columns the row has.

    A format with a column that is named in `columns` takes precedence. In a table of several formats, the columns of
    the other formats are null, so the first format with a value is taken.

    Args:
        row: The JSON object.
        columns: Our names of columns -> the data's, if they differ.

    Raises:
        WrongColumns: No format has such columns.
    """
    ways = [(known, mine) for known in FORMATS.values() for mine in known.columns]
    named = [(known, mine) for known, mine in ways if any(column in columns for column in mine)]
    empty = None
    for known, mine in named or ways:
        theirs = [columns.get(column, column) for column in mine]
        if all(column in row for column in theirs):
            if any(row[column] is not None for column in theirs):
                return known, mine
            empty = empty or (known, mine)
    if empty is not None:
        return empty
    if named:
        missing = sorted({columns.get(column, column) for _, mine in named for column in mine} - set(row))
        raise WrongColumns("missing_column", f"no column {', '.join(map(shown, missing))}")
    if "input_ids" in row:
        raise WrongColumns(
            "pre_tokenised", "the row contains input_ids; give its text instead, so that one tokenizer is used"
        )
    there = ", ".join(shown(key, 30) for key in list(row)[:8]) or "no column at all"
    usual = "; ".join(", ".join(known.columns[0]) for known in FORMATS.values())
    raise WrongColumns(
        "unknown_format",
        f"{there}; expected {usual} (datatools ls formats); name other columns with --columns "
        "prompt=YOURS,completion=YOURS (of target rows: --target-columns)",
    )
