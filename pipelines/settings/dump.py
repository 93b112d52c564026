"""Writing settings: as YAML that `load.load_config` reads back, as plain values, and as a fingerprint."""

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.settings import redaction
from pipelines.settings.base import Json, Settings
from pipelines.settings.yaml import Dumper


def _marked(field: Any, *marks: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and any(extra.get(mark) for mark in marks)


def _plain(value: object) -> Json:
    if isinstance(value, Settings):
        return as_dict(value)
    if isinstance(value, str | Path):
        return redaction.hide(_tilde(str(value)))
    if isinstance(value, Mapping):
        return {redaction.hide(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    assert value is None or isinstance(value, bool | int | float), type(value)
    return value


def _tilde(text: str) -> str:
    """Return a path in the home folder with `~`, without the name of its owner."""
    home = str(Path.home())
    return "~" + text[len(home) :] if home != "/" and (text == home or text.startswith(home + "/")) else text


def as_dict(config: Settings, *, leave_out: Sequence[str] = ("volatile",)) -> dict[str, Json]:
    """Return settings as plain values; the home folder is `~`, and secrets are `***`.

    Args:
        config: The settings.
        leave_out: Marks (see `marks`) of the fields to leave out.
    """
    fields = type(config).model_fields
    return {name: _plain(getattr(config, name)) for name, field in fields.items() if not _marked(field, *leave_out)}


def flatten(value: Json, prefix: str = "") -> dict[str, Json]:
    """Return nested settings as a flat mapping with dotted names.

    Args:
        value: The settings as plain values.
        prefix: The dotted name of `value` itself.

    Example:
        >>> flatten({"model": {"name": "x"}, "seed": 0})
        {'model.name': 'x', 'seed': 0}
    """
    if isinstance(value, dict) and (value or not prefix):
        flat: dict[str, Json] = {}
        for key, inner in value.items():
            flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
        return flat
    return {prefix: value}


def fingerprint(config: Settings) -> dict[str, Json]:
    """Return the settings that can change the result, by dotted name; two runs may share a folder if these are equal.

    Args:
        config: The settings.
    """
    return flatten(as_dict(config, leave_out=("volatile", "elsewhere", "late")))


def config_digest(config: Settings) -> str:
    """Return the 128-bit BLAKE2b digest of `fingerprint`, in hexadecimal.

    Args:
        config: The settings.
    """
    text = json.dumps(fingerprint(config), sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def dump(config: Settings, *, comments: bool = False) -> str:
    """Return YAML that `load_config` reads back to equal settings.

    Args:
        config: The settings.
        comments: Whether to write the meaning of each setting above it.
    """
    return "".join(_dump_level(config, 0, comments))


def _dump_level(config: Settings, depth: int, comments: bool) -> list[str]:
    pad, lines = "  " * depth, []
    for name, field in type(config).model_fields.items():
        if _marked(field, "volatile"):
            continue
        value = getattr(config, name)
        if value is None and not comments and _marked(field, "unsaid"):
            continue
        if comments and field.description:
            wrapped = textwrap.wrap(field.description, 110 - len(pad), break_on_hyphens=False)
            lines += [f"{pad}# {line}\n" for line in wrapped]
        if isinstance(value, Settings):
            lines.append(f"{pad}{name}:\n")
            lines += _dump_level(value, depth + 1, comments)
        else:
            lines.append(f"{pad}{name}: {flow(value)}\n")
    return lines


def flow(value: object) -> str:
    """Return one value as YAML on one line.

    Args:
        value: The value.
    """
    text = yaml.dump(
        _plain(value), Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
