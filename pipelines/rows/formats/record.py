"""The record of a row format, and the input of its reader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.rows.formats.shape import Shape
from pipelines.rows.jsonl import Malformed


class WrongColumns(Malformed):
    """The columns of a row belong to no format, or to one that the settings do not allow."""


@dataclass(frozen=True, slots=True)
class Given:
    """One row and how to read it.

    Attributes:
        row: The JSON object.
        names: Our column names -> those of the data, if they differ.
        preference: Which answer of a row with a chosen and a rejected one is its answer; None refuses such rows.
    """

    row: Mapping[str, Any]
    names: Mapping[str, str]
    preference: str | None = None

    def get(self, column: str) -> Any:
        """Return the value in a column; None if there is none.

        Args:
            column: Our name of the column.
        """
        return self.row.get(self.names.get(column, column))


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One row format.

    Attributes:
        name: The name in code and tests; the stem of its file.
        title: The name for people, usually its columns.
        learned: Which part has loss.
        example: A row as a line of JSON.
        used_by: Tools that write such rows, and variants that are read too.
        rendering: How the row becomes one text.
        columns: The columns that decide, all of which a row must have; several sets are variants, tried in order.
        optional: Further columns that the format reads, and keys of its turns.
        read: (row, the set of `columns` that it has) -> its shape. Raises Malformed if it is not fit to train on.
    """

    name: str
    title: str
    learned: str
    example: str
    used_by: str
    rendering: str
    columns: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    read: Callable[[Given, tuple[str, ...]], Shape]


BY_TEMPLATE = "by the chat template"
TEXTS_OR_LISTS = "texts joined without a template; lists of messages by the chat template"
PLAIN = "as it is"
"""Ways of rendering (`Format.rendering`). The encoder distinguishes them by the content of `Shape`: messages, a prompt
with a completion, or a text."""
