"""plan.json of a feature store: what determines its features, and how its rows are divided into units.

    {"format": 2, "meta": ..., "dim": ..., "dtype": ..., "ranges": [...], "digest": ...}

`ranges` has one entry for the first rows of the store and one for each time that rows were added, and names the file of
their keys (see `datatools.features.ranges`). Format 1 has "units" in its place, the keys of each unit as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import files
from datatools.compact import FullKeys
from datatools.errors import DataError
from datatools.features import ranges

FORMAT = 2
"""The format of new stores; stores of format 1 are read, and grow in their format."""

NAME = "plan.json"


_KEY = re.compile(r"[0-9a-f]{32}")


_ABSENT = object()


def seal(body: Mapping[str, Any]) -> bytes:
    """Serialize a mapping as JSON with its digest as the last entry.

    Args:
        body: a mapping that JSON can represent.

    Returns:
        The JSON text as bytes.

    """
    return files.json_bytes({**body, "digest": files.digest(files.json_bytes(body))})


def unseal(data: bytes) -> dict[str, Any]:
    """Parse bytes that `seal` wrote.

    Args:
        data: the content of a file.

    Returns:
        The mapping, without the digest.

    Raises:
        ValueError: if `data` is not, byte for byte, what `seal` wrote.

    """
    try:
        body = json.loads(data)
        body.pop("digest")  # which `seal` computes again
        if seal(body) != data:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its digest does not match") from None
    return dict(body)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """List the leaves in which two nested mappings differ. Values are compared as JSON text: 1 and 1.0 differ.

    Args:
        old: a nested mapping, or a leaf.
        new: a nested mapping, or a leaf.
        name: dotted name of both; empty at the top.

    Yields:
        (dotted name, old value, new value).

    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{name}.{key}" if name else str(key))
    elif _value(old) != _value(new):  # as text: 1 and 1.0 are equal numbers but not the same setting
        yield name, old, new


def _value(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, sort_keys=True)


class OtherFeatures(DataError):
    r"""The features of a store were computed differently: from another model, or with other settings.

    Example:
        >>> import tempfile
        >>> from datatools import GradientFeatures, OtherFeatures
        >>> folder = tempfile.mkdtemp()
        >>> store = GradientFeatures.create_or_open(folder, meta={"model": "a"}, dim=4, keys=[])
        >>> try:
        ...     GradientFeatures.create_or_open(folder, meta={"model": "b"}, dim=4, keys=[])
        ... except OtherFeatures as error:
        ...     "model was \"a\" and is now \"b\"" in str(error)
        True

    """


def head_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Extract the part of a plan that may never change in a store.

    Args:
        plan: a plan.

    Returns:
        Format, meta, dim and dtype.

    """
    return {name: plan[name] for name in ("format", "meta", "dim", "dtype")}


def meta_digest(plan: Mapping[str, Any]) -> str:
    """Compute the digest of `head_of(plan)`, which every unit records.

    Args:
        plan: a plan.

    Returns:
        32 hexadecimal characters.

    """
    return files.digest(files.json_bytes(head_of(plan)))


def read(folder: Path) -> dict[str, Any]:
    """Read the plan of a store.

    Args:
        folder: the store.

    Returns:
        The plan.

    Raises:
        DataError: if the plan is damaged or has another format.

    """
    path = folder / NAME
    try:
        plan = unseal(files.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; remove the folder and extract the features again") from None
    if plan.get("format") not in (1, FORMAT):
        raise DataError(
            f"{path} has format {plan.get('format')}, written by another version of datatools; this one "
            f"reads formats 1 and {FORMAT}: use that version, or extract into another folder"
        )
    return plan


def units_of(folder: Path, plan: Mapping[str, Any]) -> ranges.Units:
    """Return the units of a plan.

    Args:
        folder: the store.
        plan: its plan.

    Returns:
        The units.

    Raises:
        DataError: if a file of keys is missing or damaged.

    """
    return ranges.Listed(plan["units"]) if plan["format"] == 1 else ranges.Ranges(folder, plan["ranges"])


def extended(folder: Path, plan: Mapping[str, Any], keys: FullKeys, rows_per_unit: int) -> dict[str, Any]:
    """Return a plan with more rows, whose keys are written to the folder; the plan itself is not.

    Args:
        folder: the store.
        plan: its plan.
        keys: the keys of the new rows.
        rows_per_unit: rows per unit.

    Returns:
        The new plan.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk.

    """
    if plan["format"] == 1:
        added = [" ".join(keys[start : start + rows_per_unit]) for start in range(0, len(keys), rows_per_unit)]
        return {**plan, "units": [*plan["units"], *added]}
    written = [ranges.write(folder, keys, rows_per_unit)] if len(keys) else []
    return {**plan, "ranges": [*plan["ranges"], *written]}


def refusal(folder: Path, differing: Sequence[tuple[str, Any, Any]]) -> str:
    """Compose the message for a store whose features were computed differently.

    Args:
        folder: the store.
        differing: (dotted name, old value, new value) of each difference.

    Returns:
        What differs and what to do.

    """

    def short(value: Any) -> str:
        text = _value(value)
        return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"

    fields = ", ".join(
        f"{name.removeprefix('meta.')} was {short(old)} and is now {short(new)}" for name, old, new in differing[:3]
    )
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    return (
        f"the features in {folder} were made differently: {fields}{more}; go back to the old setting, or write to "
        "another folder"
    )


def checked(keys: Sequence[str]) -> FullKeys:
    """Refuse keys that are not content hashes, or that appear twice.

    Args:
        keys: keys of rows.

    Returns:
        The same keys.

    Raises:
        ValueError: for the first key that is not 32 hexadecimal characters, or appears twice.

    """
    for key in () if isinstance(keys, FullKeys) else keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a row's key must be 32 hex characters (its content hash); got {key[:40]!r}")
    found = FullKeys.of(keys)
    repeated = found.repeated()
    if repeated.any():
        seen: set[str] = set()
        for place in repeated.nonzero()[0].tolist():
            if (key := found[place]) in seen:
                raise ValueError(f"key {key} appears twice; pass each key once, and map equal rows to the same key")
            seen.add(key)
    return found
