"""Values of a run's JSON files, any of which may be absent, null or of another type."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatools import DataError, files

Json = Mapping[str, Any]


def finite(value: object) -> float | None:
    """Return a finite number as a float, or None.

    Args:
        value: The value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> Json:
    """Return a JSON object; an empty one if the value is none.

    Args:
        value: The value.
    """
    return value if isinstance(value, Mapping) else {}


def listing(value: object) -> list[Json]:
    """Return the objects of a JSON array; empty if the value is none.

    Args:
        value: The value.
    """
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def share_of(part: float | None, whole: float | None) -> float | None:
    """Return part / whole; None if one of them is unknown.

    Args:
        part: The part.
        whole: The whole.
    """
    return part / whole if part is not None and whole else None


def read_summary(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing, damaged or not an object.
    """
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}; run the same command again")
    return value
