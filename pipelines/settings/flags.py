"""The flags of a command, read from its settings.

`pipelines.cli.flags` turns them into options of typer. Libraries that generate command lines from models
(pydantic-settings, jsonargparse, tyro) name a flag after its position in the models, so that `warmup.learning_rate`
could not be --learning-rate, and they have their own error messages.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipelines.settings.base import FilePath, Name, Settings
from pipelines.settings.marks import PANELS, Flag, Flags, OneOf


@dataclass(frozen=True)
class Setting:
    """A flag of one command, with the facts from its field.

    Attributes:
        flag: The mark.
        paths: Dotted names of the settings that the flag sets; several if sections share it.
        kind: The type of one value: bool, int, float, Path or str.
        help: The description of the field.
        default: The default that help shows; "" for none.
        repeats: Whether the flag may be given several times.
        listed: Whether the value is a list of names, separated by commas.
        choices: The possible names, if they are known.
        nulls: The section that the value `flag.off` sets to null.
    """

    flag: Flag
    paths: tuple[str, ...]
    kind: type
    help: str
    default: str
    repeats: bool = False
    listed: bool = False
    choices: tuple[str, ...] = ()
    nulls: str = ""


def flags_of(model: type[Settings]) -> list[Setting]:
    """Return the flags of a command, in the order of help.

    Args:
        model: The settings of the command.
    """
    found: dict[str, Setting] = {}
    for setting in _settings(model):
        name = setting.flag.name
        if name in found:
            found[name] = replace(found[name], paths=(*found[name].paths, *setting.paths))
        else:
            found[name] = setting
    return sorted(found.values(), key=lambda setting: PANELS.index(setting.flag.panel))


def _settings(model: type[Settings]) -> Iterator[Setting]:
    for name, info in model.model_fields.items():
        if (flag := _mark(model, name)) is not None:
            yield _setting(flag, name, info.description or "", info, info.default)
        section = submodel(info.annotation)
        if section is None:
            continue
        for inner, opened in [(one, mark) for mark in info.metadata if isinstance(mark, Flags) for one in mark.names]:
            flag = _mark(section, inner)
            assert flag is not None, f"{section.__name__}.{inner} has no flag"
            leaf = section.model_fields[inner]
            value = (
                flag.off if info.default is None else leaf.default
            )  # the section is null, or has the defaults of its class
            text = leaf.description or ""
            if inner == section.shorthand:
                text = f"{info.description}: {text}"
            nulls = name if flag.off is not None and type(None) in members(info.annotation) else ""
            if nulls:
                text = f"{text}; {flag.off} {flag.off_means}"
            renamed = replace(flag, name=opened.renamed.get(inner, flag.name), default=opened.default or flag.default)
            yield replace(_setting(renamed, f"{name}.{inner}", text, leaf, value), nulls=nulls)


def _mark(model: type[Settings], name: str) -> Flag | None:
    """Return the mark of a field; a field that a subclass redefines keeps it."""
    for base in model.__mro__:
        info = getattr(base, "__pydantic_fields__", {}).get(name)
        found = next((mark for mark in info.metadata if isinstance(mark, Flag)), None) if info is not None else None
        if found is not None:
            return found
    return None


def _setting(flag: Flag, path: str, text: str, info: FieldInfo, default: object) -> Setting:
    kinds = [member for member in members(info.annotation) if member is not type(None)]
    item = next((get_args(member)[0] for member in kinds if get_origin(member) is list), None)
    inner = kinds if item is None else members(item)
    choices = _choices(info, inner)
    # file names may contain commas; other names do not
    repeats = item in (Name, FilePath) or any(get_origin(member) is dict for member in kinds)
    kind = next((one for one in (bool, int, float, Path) if inner == [one]), str)
    metavar = flag.metavar or {int: "N", float: "X", Path: "FILE"}.get(kind, "NAME")
    if isinstance(default, list):
        default = ",".join(map(str, default)) or None
    shown = "" if default is None or default is False or default is PydanticUndefined else str(default)
    return Setting(
        replace(flag, metavar=metavar),
        (path,),
        kind,
        text,
        flag.default or shown,
        repeats=repeats,
        listed=item is not None and not repeats,
        choices=choices,
    )


def _choices(info: FieldInfo, inner: list[Any]) -> tuple[str, ...]:
    marks = [mark for mark in info.metadata if isinstance(mark, OneOf)]
    item = next((get_args(member)[0] for member in members(info.annotation) if get_origin(member) is list), None)
    marks += [mark for mark in getattr(item, "__metadata__", ()) if isinstance(mark, OneOf)]
    if marks:
        return marks[0].names()
    return tuple(name for member in inner if get_origin(member) is Literal for name in get_args(member))


def values_of(model: type[Settings], given: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
    """Return what was given on the command line, as settings.

    Args:
        model: The settings of the command.
        given: Parameter name -> value, for at least the flags.

    Returns:
        A mapping from dotted names of settings to values, where None is "not given", and the sections that a flag set
        to null.
    """
    values: dict[str, object] = {}
    nulls: list[str] = []
    for setting in flags_of(model):
        value = given[parameter_name(setting.flag.name)]
        if setting.nulls and value == setting.flag.off:
            nulls.append(setting.nulls)
            value = None
        elif setting.kind is bool:
            value = value or None
        elif setting.listed and value is not None:
            value = [name.strip() for name in value.split(",") if name.strip()]
        values |= dict.fromkeys(setting.paths, value)
    return values, nulls


def parameter_name(flag: str) -> str:
    """Return the parameter name of a flag: `--lora-rank` is `lora_rank`.

    Args:
        flag: The flag.
    """
    return flag.removeprefix("--").replace("-", "_")


def flag_for(model: type[Settings], name: str) -> str:
    """Return the flag of a setting, or of the shorthand of a section; "" if there is none.

    Args:
        model: The settings of the command.
        name: The name of the setting.
    """
    section = submodel(model.model_fields[name].annotation) if name in model.model_fields else None
    path = f"{name}.{section.shorthand}" if section is not None and section.shorthand else name
    return next((setting.flag.name for setting in flags_of(model) if path in setting.paths), "")


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, with Annotated and unions resolved.

    Args:
        annotation: The annotation of a field.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in members(argument)]
    return [annotation]


def submodel(annotation: Any) -> type[Settings] | None:
    """Return the settings model among the alternatives of an annotation; None if there is none.

    Args:
        annotation: The annotation of a field.
    """
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, Settings):
            return member
    return None
