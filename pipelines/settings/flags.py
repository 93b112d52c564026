"""The flags of a command, read from its settings.

`pipelines.cli.flags` makes options of typer from them. Libraries that generate command lines from models
(pydantic-settings, jsonargparse, tyro) name a flag after its place in the models, so that `warmup.learning_rate` would
not be --learning-rate, and have errors in words of their own.
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
    """A flag of one command, with what its field says.

    Attributes:
        flag: the mark.
        paths: dotted names of the settings that it sets; several where sections share a flag.
        kind: the type of one value: bool, int, float, Path or str.
        help: the field's description.
        default: the default as help shows it, "" for none.
        repeats: whether the flag may be given several times.
        listed: whether its value is a list of names, separated by commas.
        choices: the names that it may have, if they are known.
        nulls: the section that the value `flag.off` makes null.
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
    """The flags of the command whose settings are `model`, in the order of help."""
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
            value = flag.off if info.default is None else leaf.default  # a section is null, or what its class says
            text = leaf.description or ""
            if inner == section.shorthand:
                text = f"{info.description}: {text}"
            nulls = name if flag.off is not None and type(None) in members(info.annotation) else ""
            if nulls:
                text = f"{text}; {flag.off} {flag.off_means}"
            renamed = replace(flag, name=opened.renamed.get(inner, flag.name), default=opened.default or flag.default)
            yield replace(_setting(renamed, f"{name}.{inner}", text, leaf, value), nulls=nulls)


def _mark(model: type[Settings], name: str) -> Flag | None:
    """The mark of a field; a field that a subclass states anew keeps it."""
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
    # names of files may hold commas; other names do not
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
    """What was given on the command line, as settings.

    Args:
        model: the settings of the command.
        given: parameter name -> value, of at least the flags.

    Returns:
        Dotted names of settings -> values, where None is "not given"; and the sections that a flag made null.
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
    """`--lora-rank` is the parameter `lora_rank`."""
    return flag.removeprefix("--").replace("-", "_")


def flag_for(model: type[Settings], name: str) -> str:
    """The flag that gives the setting `name`, or the section that its shorthand stands for; "" for none."""
    section = submodel(model.model_fields[name].annotation) if name in model.model_fields else None
    path = f"{name}.{section.shorthand}" if section is not None and section.shorthand else name
    return next((setting.flag.name for setting in flags_of(model) if path in setting.paths), "")


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, with Annotated and unions opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in members(argument)]
    return [annotation]


def submodel(annotation: Any) -> type[Settings] | None:
    """The settings model among the alternatives of an annotation."""
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, Settings):
            return member
    return None
