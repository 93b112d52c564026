"""How YAML, flags and `--set` become a settings model, and how one is written down.

Weakest first: defaults < a run to lean on < YAML < flags < `--set a.b=c`. Unknown names are errors.
Nothing here imports torch, so that `--help` and `--print-config` answer at once.
"""

import difflib
import hashlib
import json
import textwrap
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipelines.settings import redaction, trust
from pipelines.settings.config import Json, OrderConfig, Settings, TrainingConfig, home

MAX_YAML_BYTES = 1_000_000
MAX_YAML_DEPTH = 32

# -------------------------------------------------------------------------------------------------------------- YAML

# libyaml where there is one: 1 MB in a second, not in twenty
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = r"[-+]?(?:0|[1-9][0-9]*)"
_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_BOOL = r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
_NULL = r"~|null|Null|NULL|"
_ODD_NUMBER = r"[-+]?0[0-9_]+|[-+]?0[xXoObB][0-9a-fA-F_]+|[-+]?[0-9][0-9_]*_[0-9_]*"


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Plain scalars: YAML 1.2's numbers, YAML 1.1's truth values; dates and 1:30 stay text.

    Truth values stay so that `no` for a text is refused by its type and not taken differently by two YAML readers;
    `010` (8 to some readers, 10 to others), hexadecimal and underscored numbers are refused by name.
    """
    import re

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


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: object) -> bool:
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
                f"a setting's name must be text and is {shown}; put it in quotes if it is meant",
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
    """The value of one YAML document; `name` is what errors call it.

    Refused: duplicate keys, anchors and aliases, tags, merge keys, more than 1 MB, deeper than 32, two documents,
    numbers that YAML versions disagree about. Raises: UsageError.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_YAML_BYTES:
        _refuse(f"{name}: {size} bytes of YAML; at most {MAX_YAML_BYTES} are read")
    try:
        depth = documents = 0
        for event in yaml.parse(text, Loader=_Loader):  # events first: nothing is built from what will be refused
            at = _where(event.start_mark)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                _refuse(
                    f"{name}, {at}: anchors and aliases (& and *) are not read; write the value out where it is used"
                )
            tag = getattr(event, "tag", None)
            if tag is not None:
                _refuse(f"{name}, {at}: the tag {tag} is not read; a setting is text, a number, a list or a mapping")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    _refuse(f"{name}, {at}: a second document ('---'); one file holds one configuration")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_YAML_DEPTH:
                    _refuse(f"{name}, {at}: nested more than {MAX_YAML_DEPTH} deep")
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
        _refuse(f"{name}, {at}: {error.problem or error.context or 'not YAML'}")
    except (yaml.YAMLError, UnicodeError, ValueError) as error:
        _refuse(f"{name}: not readable as YAML: {' '.join(str(error).split())[:200]}")


def read_yaml(path: Path) -> dict[str, Json]:
    """The mapping in a YAML file. Raises: UsageError, as `parse_yaml`, and for files that cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_YAML_BYTES:
            _refuse(f"{path}: {size} bytes; a configuration has at most {MAX_YAML_BYTES}")
        if path.is_dir():
            raise IsADirectoryError
        from datatools import files

        text = files.read_bytes(path).decode("utf-8-sig")
    except IsADirectoryError:
        _refuse(f"{path} is a folder; expected a YAML file, such as {path / 'run.yaml'}")
    except OSError as error:
        _refuse(f"{path}: cannot be read ({error.strerror}); expected a YAML file with settings")
    except UnicodeDecodeError as error:
        _refuse(f"{path}: not UTF-8 text at byte {error.start}; expected a YAML file with settings")
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(f"{path}: holds a {type(value).__name__}; expected settings, one 'name: value' a line")
    return value


# ------------------------------------------------------------------------------------------------------------ loading

M = TypeVar("M", bound=Settings)


def _refuse(message: str) -> NoReturn:
    from datatools import UsageError

    raise UsageError(message) from None


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, with Annotated and unions opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _submodel(annotation: Any) -> type[Settings] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Settings):
            return member
    return None


def _takes(annotation: Any, *kinds: Any) -> bool:
    return any(member in kinds or (get_origin(member) is Literal and str in kinds) for member in _members(annotation))


def all_names(model: type[Settings], prefix: str = "") -> list[str]:
    """The dotted names of all settings of `model`."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if (sub := _submodel(field.annotation)) is not None:
            names += all_names(sub, f"{prefix}{name}.")
    return names


def _unknown(model: type[Settings], root: type[Settings], path: str, key: str, origin: str) -> NoReturn:
    """`select.yaml: SelectConfig has no setting 'fracton'; did you mean 'fraction'?`, found at any level."""
    close = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.7)
    if not close:  # a setting of another level: say where it lives
        leaves: dict[str, list[str]] = {}
        for name in all_names(root):
            leaves.setdefault(name.rpartition(".")[2], []).append(name)
        close = [name for leaf in difflib.get_close_matches(key, leaves, n=1, cutoff=0.7) for name in leaves[leaf][:2]]
    close = close or difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
    hint = (
        f"; did you mean {' or '.join(repr(c) for c in close)}?"
        if close
        else f"; it has {', '.join(model.model_fields)}"
    )
    inside = f"{path}: " if path else ""
    _refuse(f"{origin}: {inside}{model.__name__} has no setting {key!r}{hint}")


def _absorb(
    root: type[Settings],
    model: type[Settings],
    data: Mapping[str, object],
    origin: str,
    into: dict[str, Any],
    origins: dict[str, str],
    prefix: str = "",
) -> None:
    """Merge `data` over `into`, level by level; lists and option mappings are replaced whole."""
    for key, value in data.items():
        if key not in model.model_fields:
            _unknown(model, root, prefix.rstrip("."), key, origin)
        path, annotation = prefix + key, model.model_fields[key].annotation
        sub = _submodel(annotation)
        if sub is not None and value is not None:
            expanded = sub.expand(value)
            if isinstance(expanded, Mapping):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                _absorb(root, sub, expanded, origin, into[key], origins, f"{path}.")
                continue
        if isinstance(value, bool) and not _takes(annotation, bool):
            _refuse(
                f"{origin}: setting {path!r} is {'yes/true/on' if value else 'no/false/off'}, a truth value; expected "
                f"{model.model_fields[key].description}; put text in quotes ('yes', 'no')"
            )
        into[key] = value
        origins[path] = origin


def _assign(model: type[Settings], assignment: str, into: dict[str, Any], origins: dict[str, str]) -> None:
    """One `--set a.b=c`. The value is read as YAML, but stays text where the setting is text."""
    path, equals, text = assignment.partition("=")
    path, text = path.strip(), text.strip()
    origin = f"--set {path}"
    if not equals or not path:
        _refuse(f"--set {assignment!r}: expected NAME=VALUE, such as --set projector.dim=4096")
    parts = path.split(".")
    level: type[Settings] = model
    here = into
    for depth, part in enumerate(parts):
        done = ".".join(parts[:depth])
        if part not in level.model_fields:
            _unknown(level, model, done, part, origin)
        field = level.model_fields[part]
        sub = _submodel(field.annotation)
        last = depth == len(parts) - 1
        if sub is not None and not last:
            if not isinstance(here.get(part), dict):
                here[part] = {}
            level, here = sub, here[part]
            continue
        if last:
            value: Json
            if _takes(field.annotation, str, Path) and not _takes(field.annotation, int, float, bool):
                listed = text.startswith("[") and any(get_origin(m) is list for m in _members(field.annotation))
                none = text in ("", "~", "null") and _takes(field.annotation, type(None))
                value = parse_yaml(text, origin) if listed else None if none else text
            else:
                value = parse_yaml(text, origin)
            _absorb(model, level, {part: value}, origin, here, origins, f"{done}." if done else "")
            return
        if any(get_origin(member) is dict for member in _members(field.annotation)) and depth == len(parts) - 2:
            table = here.get(part)
            here[part] = {**(table if isinstance(table, dict) else {}), parts[-1]: parse_yaml(text, origin)}
            origins[".".join(parts[: depth + 1])] = origin
            return
        _refuse(f"{origin}: {'.'.join(parts[: depth + 1])!r} has no settings inside; set it as a whole")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(model: type[Settings], error: ValidationError, origins: Mapping[str, str]) -> str:
    """A pydantic error in the house's words: who, what came, what was expected, what to do."""
    lines: dict[str, str] = {}  # one a setting: a union complains once for each of its members
    for problem in sorted(error.errors(include_url=False), key=lambda e: -len(e["loc"])):
        path, level, description = [], model, ""
        inside_model = True
        for part in problem["loc"]:
            if inside_model and isinstance(part, str) and part in level.model_fields:
                field = level.model_fields[part]
                path.append(part)
                description = field.description or ""
                sub = _submodel(field.annotation)
                inside_model = sub is not None
                level = sub or level
            elif isinstance(part, int) and path:
                path[-1] += f"[{part}]"
        name = ".".join(path)
        bare = name.split("[")[0]
        origin = next(
            (origins[o] for o in sorted(origins, key=len, reverse=True) if bare == o or bare.startswith(f"{o}.")), ""
        )
        who = f"{origin}: " if origin else ""
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        message = message[:1].lower() + message[1:]
        if problem["type"] == "missing":
            flag = FLAGS.get(name)
            how = f"give {flag}, or " if flag else ""
            lines.setdefault(name, f"{model.__name__} needs {name!r} ({description}); {how}set it in the YAML")
        elif problem["type"] == "value_error" or not name:
            lines.setdefault(bare, f"{who}{name + ': ' if name else ''}{message}")
        else:
            came = problem["input"]
            if problem["type"] == "literal_error" and isinstance(came, str):
                choices = [c.strip(" '") for c in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
                close = difflib.get_close_matches(came, choices, n=1)
                message += f"; did you mean '{close[0]}'?" if close else ""
            if problem["type"] == "string_type":
                message += "; put text in quotes"
            what = f" ({description})" if description else ""
            lines.setdefault(bare, f"{who}setting {name!r} is {_short(came)}; {message}{what}")
    unique = list(lines.values())
    more = f" (and {len(unique) - 1} more: {' | '.join(unique[1:4])})" if len(unique) > 1 else ""
    return unique[0] + more


# The flag that sets a required setting, for the error that says it is missing.
FLAGS = {
    "model": "--model",
    "model.name": "--model",
    "train": "--train",
    "train.paths": "--train",
    "data": "--data",
    "data.paths": "--data",
    "pool": "--pool",
    "test": "--test",
    "selected": "--selected",
    "out": "--out",
}


def load_config(
    model: type[M],
    yaml_path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    sets: Sequence[str] | None = None,
    *,
    base: Mapping[str, object] | None = None,
    base_name: str = "the run",
    wanted: Sequence[str] = (trust.CODE, trust.PLACES),
) -> M:
    """A configuration from its sources: defaults < `base` < YAML < `flags` < `sets`.

    `flags` maps dotted names to values ("train.paths": [...]); None means not given. `sets` are "a.b=value" texts.
    `base` is what a run to lean on says (an audit takes its model from the run that it audits).
    `wanted` is what of `trust.check` the caller needs: no code to be run, nothing to be written elsewhere.
    Raises: UsageError naming the source, the setting, what came and what was expected.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if base:
        _absorb(model, model, base, base_name, tree, origins)
    if yaml_path is not None:
        _absorb(model, model, read_yaml(yaml_path), str(yaml_path), tree, origins)
    for name, value in (flags or {}).items():
        if value is None or value == [] or value == ():
            continue
        nested: object = value if not isinstance(value, tuple) else list(value)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        assert isinstance(nested, dict)
        _absorb(model, model, nested, "command line", tree, origins)
    for assignment in sets or ():
        _assign(model, assignment, tree, origins)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        _refuse(_explain(model, error, origins))
    trust.check(config, origins, wanted)
    return config


def audit_base(selected: Path | None, yaml_path: Path | None = None) -> tuple[dict[str, Json], str]:
    """What an audit takes over from the run whose selected.jsonl it judges, and the name of the file it is from.

    Model, target, pool and adapters are the run's, the training recipe is that of its warm-up.
    """
    if selected is None and yaml_path is not None:
        named = read_yaml(yaml_path).get("selected")
        selected = Path(named) if isinstance(named, str) else None
    if selected is None:
        return {}, ""
    folder = Path(home(str(selected))).parent
    path = folder / "run.yaml"
    if not path.is_file():
        return {}, ""
    run = read_yaml(path)
    base: dict[str, Json] = {name: run[name] for name in ("model", "target", "target_columns", "lora") if name in run}
    if "train" in run:
        base["pool"] = run["train"]
    warmup = run.get("warmup")
    if isinstance(warmup, dict):
        base["training"] = {name: value for name, value in warmup.items() if name in TrainingConfig.model_fields}
    kept = run.get("features")
    features = kept.get("folder") if isinstance(kept, dict) else None
    if not isinstance(features, str) or not trust.within(Path(features), folder):  # the audit writes there
        features = str(folder / "features")
    return base | {"out": str(folder / "audit"), "features": features}, str(path)


def order_base(out: Path | None) -> tuple[dict[str, Json], str]:
    """The settings of the run in `out`, which another task of `datatools order` goes on with, and its file's name."""
    folder = Path(home(str(out or OrderConfig.model_fields["out"].default)))
    path = folder / "run.yaml"
    return ({**read_yaml(path), "out": str(folder)}, str(path)) if path.is_file() else ({}, "")


# ------------------------------------------------------------------------------------------------------------- output


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
    """The settings as plain values, home folder as `~`, secrets as `***`, without fields with a mark in `leave_out`."""
    fields = type(config).model_fields
    return {name: _plain(getattr(config, name)) for name, field in fields.items() if not _marked(field, *leave_out)}


def flatten(value: Json, prefix: str = "") -> dict[str, Json]:
    """Nested settings as dotted names: {"model": {"name": "x"}} -> {"model.name": "x"}."""
    if isinstance(value, dict) and (value or not prefix):
        flat: dict[str, Json] = {}
        for key, inner in value.items():
            flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
        return flat
    return {prefix: value}


def fingerprint(config: Settings) -> dict[str, Json]:
    """Dotted name -> value of everything that can change the result; two runs may share a folder when these agree."""
    return flatten(as_dict(config, leave_out=("volatile", "elsewhere", "late")))


def config_digest(config: Settings) -> str:
    """128-bit blake2b, in hex, of `fingerprint`."""
    text = json.dumps(fingerprint(config), sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def dump(config: Settings, *, comments: bool = False) -> str:
    """YAML that `load_config` reads back to an equal configuration; `comments` puts each setting's meaning above it."""
    return "".join(_dump_level(config, 0, comments))


def _dump_level(config: Settings, depth: int, comments: bool) -> list[str]:
    pad, lines = "  " * depth, []
    for name, field in type(config).model_fields.items():
        if _marked(field, "volatile"):
            continue
        value = getattr(config, name)
        if comments and field.description:
            for line in textwrap.wrap(field.description, 110 - len(pad), break_on_hyphens=False):
                lines.append(f"{pad}# {line}\n")
        if isinstance(value, Settings):
            lines.append(f"{pad}{name}:\n")
            lines += _dump_level(value, depth + 1, comments)
        else:
            text = yaml.dump(
                _plain(value), Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False
            )
            lines.append(f"{pad}{name}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}\n")
    return lines
