"""plan.json of a feature store: what its features are a function of, and which keys belong to which unit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import files
from datatools.errors import DataError

FORMAT = 1


NAME = "plan.json"


_KEY = re.compile(r"[0-9a-f]{32}")


_ABSENT = object()


def seal(body: Mapping[str, Any]) -> bytes:
    """`body` as JSON, with its digest as the last entry."""
    return files.json_bytes({**body, "digest": files.digest(files.json_bytes(body))})


def unseal(data: bytes) -> dict[str, Any]:
    """The body of `seal`. Raises: ValueError unless `data` is what `seal` wrote, byte for byte."""
    try:
        body = json.loads(data)
        body.pop("digest")  # which `seal` computes again
        if seal(body) != data:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its digest does not match") from None
    return dict(body)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of each leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{name}.{key}" if name else str(key))
    elif _value(old) != _value(new):  # as text: 1 and 1.0 are equal numbers but not the same setting
        yield name, old, new


def _value(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, sort_keys=True)


class OtherFeatures(DataError):
    """A store in which features were made differently: of another model, with other settings."""


def head_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What may never change in a store."""
    return {name: plan[name] for name in ("format", "meta", "dim", "dtype")}


def meta_digest(plan: Mapping[str, Any]) -> str:
    """The digest of the head, which stands in every unit."""
    return files.digest(files.json_bytes(head_of(plan)))


def read(folder: Path) -> dict[str, Any]:
    """The plan of the store in `folder`. Raises: DataError if it is damaged or of another format."""
    path = folder / NAME
    try:
        plan = unseal(files.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; remove the folder and extract the features again") from None
    if plan.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {plan.get('format')}, written by another version of datatools; this one "
            f"reads format {FORMAT}: use that version, or extract into another folder"
        )
    return plan


def refusal(folder: Path, differing: Sequence[tuple[str, Any, Any]]) -> str:
    """What to say of a store whose features were made differently."""

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


def check_keys(keys: Sequence[str]) -> None:
    """Refuse keys that are no content hashes, or that come twice. Raises: ValueError."""
    seen: set[str] = set()
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a row's key is 32 hex characters (its content hash); got {key[:40]!r}")
        if key in seen:
            raise ValueError(f"key {key} is there twice; give each content once and map rows to keys outside")
        seen.add(key)
