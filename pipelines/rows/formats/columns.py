"""Columns by other names: the map from our names to those of the data."""

import fnmatch
import os
from collections.abc import Collection, Mapping

from datatools import UsageError, did_you_mean

ANY_FORMAT = ("tools", "id", "source", "subtask")
"""Columns that a row of any format may have: `source` is the row's source, `subtask` its part of a target."""

Columns = Mapping[str, str | Mapping[str, str]]
"""Our names -> the data's; also file -> a map of its own, which then is the only one for that file."""


def check_columns(columns: Columns | None, known: Collection[str]) -> dict[str, str | dict[str, str]]:
    """The `columns` map with its names checked.

    Args:
        columns: Our names -> the data's, also file by file.
        known: Our names (`table.column_names`).

    Raises:
        UsageError: One of our names is unknown; the message gives the nearest known one.
    """
    checked: dict[str, str | dict[str, str]] = {}
    for name, theirs in (columns or {}).items():
        own = {name: theirs} if isinstance(theirs, str) else theirs
        for key in own:
            if key not in known:
                raise UsageError(f"columns: no column is called '{key}'{did_you_mean(key, known)}")
        checked[name] = theirs if isinstance(theirs, str) else dict(theirs)
    return checked


def columns_of(file: str, columns: Mapping[str, str | dict[str, str]]) -> tuple[dict[str, str], str | None]:
    """The map for one file.

    Args:
        file: The name of the file. A map may name it by its path, its last part, a folder above it, or a pattern of
            these (*.jsonl).
        columns: Our names -> the data's, also file by file.

    Returns:
        The map, and the name that the file has in `columns` if it has a map of its own there.
    """
    for name, own in columns.items():
        if isinstance(own, dict) and (
            file == name
            or file.startswith(name.rstrip("/") + "/")
            or any(fnmatch.fnmatchcase(path, name) for path in (file, os.path.basename(file)))
        ):
            return own, name
    return {name: theirs for name, theirs in columns.items() if isinstance(theirs, str)}, None
