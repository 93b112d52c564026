"""Columns with other names: the mapping from our names to those of the data."""

import fnmatch
import os
from collections.abc import Collection, Mapping

from datatools import UsageError, did_you_mean

ANY_FORMAT = ("tools", "id", "source", "subtask", "reward", "gold", "options", "tests")
"""Columns that a row of any format may have.

`source` is the row's source, `subtask` its subtask of the target, `reward` how good its answer is (`select --objective
reward`). `gold` (by default the column `answer`), `options` and `tests` say how an answer is judged.
"""

Columns = Mapping[str, str | Mapping[str, str]]
"""Our names -> the data's; or file -> its own mapping, which is then the only one for that file."""


def check_columns(columns: Columns | None, known: Collection[str]) -> dict[str, str | dict[str, str]]:
    """Check the names of a `columns` mapping.

    Args:
        columns: Our names -> the data's, also per file.
        known: Our names (`table.column_names`).

    Returns:
        The mapping.

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
    """Return the column mapping of one file.

    Args:
        file: The name of the file. A mapping may name it by its path, its last part, a folder above it, or a pattern
            of these (*.jsonl).
        columns: Our names -> the data's, also per file.

    Returns:
        The mapping, and the name of the file in `columns` if it has its own mapping there.
    """
    for name, own in columns.items():
        if isinstance(own, dict) and (
            file == name
            or file.startswith(name.rstrip("/") + "/")
            or any(fnmatch.fnmatchcase(path, name) for path in (file, os.path.basename(file)))
        ):
            return own, name
    return {name: theirs for name, theirs in columns.items() if isinstance(theirs, str)}, None
