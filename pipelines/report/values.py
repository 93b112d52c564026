"""Values of a run's JSON files, of which any may be absent, null or of another type."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatools import DataError, files

Json = Mapping[str, Any]


def finite(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> Json:
    """A JSON object, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def listing(value: object) -> list[Json]:
    """The objects of a JSON array, or none."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def share_of(part: float | None, whole: float | None) -> float | None:
    """part / whole, where both are known."""
    return part / whole if part is not None and whole else None


def read_summary(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DataError: if it is missing, damaged or no object.
    """
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}; run the same command again")
    return value
