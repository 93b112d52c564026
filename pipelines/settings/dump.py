"""How settings are written: as YAML that `load.load_config` reads back, as plain values, and as a fingerprint."""

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
    """A path in the home folder, without its owner's name."""
    home = str(Path.home())
    return "~" + text[len(home) :] if home != "/" and (text == home or text.startswith(home + "/")) else text


def as_dict(config: Settings, *, leave_out: Sequence[str] = ("volatile",)) -> dict[str, Json]:
    """The settings as plain values: the home folder is `~`, and secrets are `***`.

    Args:
        config: the settings.
        leave_out: marks (see `marks`) of the fields to leave out.
    """
    fields = type(config).model_fields
    return {name: _plain(getattr(config, name)) for name, field in fields.items() if not _marked(field, *leave_out)}


def flatten(value: Json, prefix: str = "") -> dict[str, Json]:
    """Nested settings as dotted names.

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
    """Dotted name -> value of all that can change the result; two runs may share a folder when these are equal."""
    return flatten(as_dict(config, leave_out=("volatile", "elsewhere", "late")))


def config_digest(config: Settings) -> str:
    """The 128-bit BLAKE2b digest of `fingerprint`, in hexadecimal."""
    text = json.dumps(fingerprint(config), sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def dump(config: Settings, *, comments: bool = False) -> str:
    """YAML that `load_config` reads back to equal settings; `comments` puts the meaning of each setting above it."""
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
    """One value as YAML on one line."""
    text = yaml.dump(
        _plain(value), Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
