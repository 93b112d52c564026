"""How the rows of a pool are read, and the columns that a row of any format may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.rows.formats.record import WrongColumns
from pipelines.rows.formats.shape import Shape
from pipelines.rows.formats.table import read_shape
from pipelines.rows.jsonl import Limits


@dataclass(frozen=True, slots=True)
class Options:
    """How the rows of a pool are read."""

    source_key: str
    columns: Mapping[str, str | dict[str, str]]
    detect: bool
    preference: str | None
    limits: Limits

    def read(self, value: Mapping[str, Any], columns: Mapping[str, str]) -> Shape:
        """Return the shape of a row.

        Args:
            value: The JSON object.
            columns: The columns of its file.

        Raises:
            Malformed: The row has no known format, or it is not fit to train on.
        """
        try:
            return read_shape(value, columns, self.preference)
        except WrongColumns as error:
            if not self.detect or error.reason != "missing_column":
                raise
            return read_shape(value, None, self.preference)


def own_id(value: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the id that a row has; None if it has none.

    Args:
        value: The JSON object.
        columns: The columns of its file.
    """
    found = value.get(columns.get("id", "id"))
    if isinstance(found, str):
        return found if found.strip() else None
    return str(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def source_of(value: Mapping[str, Any], columns: Mapping[str, str], source_key: str) -> str | None:
    """Return the source that a row names; None if it names none.

    Args:
        value: The JSON object.
        columns: The columns of its file.
        source_key: The column that names a row's source.
    """
    for key in (columns.get("source"), source_key, "source"):
        found = value.get(key) if key is not None else None
        if isinstance(found, int | float) and not isinstance(found, bool):
            return str(found)
        if isinstance(found, str) and found.strip():
            return found.strip()
    return None


def subtask_of(value: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the subtask of a target row; None if the row names none.

    Args:
        value: The JSON object.
        columns: The columns of its file.
    """
    found = value.get(columns.get("subtask", "subtask"))
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) else None
