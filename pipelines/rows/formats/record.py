"""What a row format is: its record, and what its reader is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.rows.formats.shape import Shape
from pipelines.rows.jsonl import Malformed


class WrongColumns(Malformed):
    """The columns of a row are those of no format, or of one that the settings do not allow."""


@dataclass(frozen=True, slots=True)
class Given:
    """One row and how to read it.

    Attributes:
        row: The JSON object.
        names: Our column names -> those of the data, where they differ.
        preference: Which answer of a row with a chosen and a rejected one is its answer; None refuses such rows.
    """

    row: Mapping[str, Any]
    names: Mapping[str, str]
    preference: str | None = None

    def get(self, column: str) -> Any:
        """The value in the column that we call `column`; None if there is none."""
        return self.row.get(self.names.get(column, column))


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One row format.

    Attributes:
        name: The name by which code and tests know it; the stem of its file.
        title: The name that people see: usually its columns.
        learned: What has loss.
        example: A row as a line of JSON.
        used_by: Who writes such rows, and variants that are read too.
        rendering: How the row becomes one text.
        columns: The columns that decide, all of which a row must have; several sets are variants, tried in order.
        optional: Further columns that the format reads, and keys of its turns.
        read: (row, the set of `columns` that it has) -> what it says. Raises Malformed if it is not fit to train on.
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
"""Ways of rendering (`Format.rendering`). The encoder tells them apart by what `Shape` holds: messages, a prompt with a
completion, or a text."""
