"""YAML for settings: a strict subset that every YAML reader reads in the same way."""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from datatools import UsageError
from pipelines.settings.base import Json

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 32


def refuse(message: str) -> NoReturn:
    """Raise a UsageError without the error that is being handled.

    Args:
        message: The message.

    Raises:
        UsageError: Always.
    """
    raise UsageError(message) from None


# with libyaml, where it is installed, 1 MB takes one second rather than twenty
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_BOOL = r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
_NULL = r"~|null|Null|NULL|"
_ODD_NUMBER = r"[-+]?0[0-9_]+|[-+]?0[xXoObB][0-9a-fA-F_]+|[-+]?[0-9][0-9_]*_[0-9_]*"


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Return the resolvers of plain scalars: numbers of YAML 1.2 and booleans of YAML 1.1; dates and 1:30 stay text.

    Booleans of YAML 1.1 are kept so that `no` for a text is refused by its type, because YAML readers disagree about
    it. `010` (8 or 10, depending on the reader), hexadecimal numbers and numbers with underscores are refused by name.
    """
    table: dict[str, list[tuple[str, Any]]] = {}
    for tag, pattern, first in [
        ("bool", _BOOL, "yYnNtTfFoO"),
        ("odd", _ODD_NUMBER, "-+0123456789"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+0123456789."),
        ("null", _NULL, ["~", "n", "N", ""]),
        ("merge", "<<", "<"),
    ]:
        for character in first:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$")))
    return table


class _Loader(_BASE):  # type: ignore[misc]
    yaml_implicit_resolvers = _resolvers()


class Dumper(yaml.SafeDumper):
    """A dumper that writes what `parse_yaml` reads back, without aliases."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: object) -> bool:
        """Return True, so that every value is written out.

        Args:
            data: Any value.
        """
        return True


def _where(mark: Any) -> str:
    return f"line {mark.line + 1}" if mark is not None else "somewhere"


def _construct_mapping(loader: Any, node: Any) -> dict[str, Json]:
    result: dict[str, Json] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag != "tag:yaml.org,2002:str":
            shown = repr(key_node.value) if isinstance(key_node.value, str) else "a list or mapping"
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"the name of a setting must be text, not {shown}; put it in quotes if you mean text",
                key_node.start_mark,
            )
        key = key_node.value
        if key in result:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} is set twice, first on line {lines[key]}; keep one", key_node.start_mark
            )
        lines[key] = key_node.start_mark.line + 1
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _construct_odd(loader: Any, node: Any) -> Json:
    raise yaml.constructor.ConstructorError(
        None,
        None,
        f"{node.value} is read as different numbers by different YAML readers; write a plain decimal number, "
        f"or '{node.value}' in quotes for text",
        node.start_mark,
    )


def _construct_int(loader: Any, node: Any) -> int:
    if len(node.value) > 40:
        raise yaml.constructor.ConstructorError(None, None, "a number of more than 40 digits", node.start_mark)
    return int(node.value)


def _construct_float(loader: Any, node: Any) -> float:
    text = node.value.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:odd", _construct_odd)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, name: str = "YAML") -> Json:
    """Return the value of one YAML document.

    Args:
        text: The document.
        name: The name of the document in messages.

    Raises:
        UsageError: The text is not YAML, or it has duplicate keys, anchors, aliases, tags, merge keys, more than 1 MB,
            more than 32 levels, a second document, or numbers that YAML versions read differently.

    Example:
        >>> parse_yaml("{epochs: 2, schedule: cosine}")
        {'epochs': 2, 'schedule': 'cosine'}
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_YAML_BYTES:
        refuse(f"{name}: {size} bytes of YAML; the limit is {MAX_YAML_BYTES}")
    try:
        depth = documents = 0
        for event in yaml.parse(text, Loader=_Loader):  # events first, so that no refused value is built
            at = _where(event.start_mark)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                refuse(f"{name}, {at}: anchors and aliases (& and *) are not allowed; write the value where it is used")
            tag = getattr(event, "tag", None)
            if tag is not None:
                refuse(f"{name}, {at}: the tag {tag} is not allowed; a setting is text, a number, a list or a mapping")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    refuse(f"{name}, {at}: a second document ('---'); a file may contain only one configuration")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_YAML_DEPTH:
                    refuse(f"{name}, {at}: nested more than {MAX_YAML_DEPTH} deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        loader = _Loader(text)
        try:
            value: Json = loader.get_single_data()
        finally:
            loader.dispose()
        return value
    except yaml.MarkedYAMLError as error:
        at = _where(error.problem_mark or error.context_mark)
        refuse(f"{name}, {at}: {error.problem or error.context or 'not YAML'}")
    except (yaml.YAMLError, UnicodeError, ValueError) as error:
        refuse(f"{name}: not readable as YAML: {' '.join(str(error).split())[:200]}")


def read_yaml(path: Path) -> dict[str, Json]:
    """Return the mapping in a YAML file.

    Args:
        path: The file.

    Raises:
        UsageError: As in `parse_yaml`, and for a file that cannot be read or contains no mapping.
    """
    try:
        size = path.stat().st_size
        if size > MAX_YAML_BYTES:
            refuse(f"{path}: {size} bytes; a configuration may have at most {MAX_YAML_BYTES}")
        if path.is_dir():
            raise IsADirectoryError
        from datatools import files

        text = files.read_bytes(path).decode("utf-8-sig")
    except IsADirectoryError:
        refuse(f"{path} is a folder; expected a YAML file, such as {path / 'run.yaml'}")
    except OSError as error:
        refuse(f"{path}: cannot be read ({error.strerror}); expected a YAML file with settings")
    except UnicodeDecodeError as error:
        refuse(f"{path}: not UTF-8 text at byte {error.start}; expected a YAML file with settings")
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(f"{path}: contains a {type(value).__name__}; expected settings, one 'name: value' per line")
    return value
