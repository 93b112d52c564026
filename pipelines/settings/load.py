"""Building settings from defaults, YAML, flags and `--set`.

Order of precedence, weakest first: defaults, the run that a command builds on, YAML, flags, `--set a.b=c`. Unknown
names are errors.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_origin

from pydantic import ValidationError

from pipelines.settings import trust
from pipelines.settings.base import Json, Settings, home
from pipelines.settings.flags import flag_for, members, submodel
from pipelines.settings.order import OrderConfig
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.yaml import parse_yaml, read_yaml, refuse

M = TypeVar("M", bound=Settings)


def _takes(annotation: Any, *kinds: Any) -> bool:
    return any(member in kinds or (get_origin(member) is Literal and str in kinds) for member in members(annotation))


def all_names(model: type[Settings], prefix: str = "") -> list[str]:
    """Return the dotted names of all settings, sections included.

    Args:
        model: The class of the settings.
        prefix: Text before every name.

    Example:
        >>> from pipelines.settings.select import SelectConfig
        >>> [name for name in all_names(SelectConfig) if name.startswith("projector")]
        ['projector', 'projector.name', 'projector.dim']
    """
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if (sub := submodel(field.annotation)) is not None:
            names += all_names(sub, f"{prefix}{name}.")
    return names


def _unknown(model: type[Settings], root: type[Settings], path: str, key: str, origin: str) -> NoReturn:
    """Refuse a name at any level: `select.yaml: SelectConfig has no setting 'fracton'; did you mean 'fraction'?`."""
    close = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.7)
    if not close:  # a setting of another level: name its section
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
    refuse(f"{origin}: {inside}{model.__name__} has no setting {key!r}{hint}")


def _absorb(
    root: type[Settings],
    model: type[Settings],
    data: Mapping[str, object],
    origin: str,
    into: dict[str, Any],
    origins: dict[str, str],
    prefix: str = "",
) -> None:
    """Merge `data` over `into`, level by level; lists and option mappings are replaced completely."""
    for key, value in data.items():
        if key not in model.model_fields:
            _unknown(model, root, prefix.rstrip("."), key, origin)
        path, annotation = prefix + key, model.model_fields[key].annotation
        sub = submodel(annotation)
        if sub is not None and value is not None:
            expanded = sub.expand(value)
            if isinstance(expanded, Mapping):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                _absorb(root, sub, expanded, origin, into[key], origins, f"{path}.")
                continue
        if isinstance(value, bool) and not _takes(annotation, bool):
            refuse(
                f"{origin}: setting {path!r} is {'yes/true/on' if value else 'no/false/off'}, a truth value; expected "
                f"{model.model_fields[key].description}; put text in quotes ('yes', 'no')"
            )
        into[key] = value
        origins[path] = origin


def _assign(model: type[Settings], assignment: str, into: dict[str, Any], origins: dict[str, str]) -> None:
    """Apply one `--set a.b=c`. The value is read as YAML, but stays text if the setting is text."""
    path, equals, text = assignment.partition("=")
    path, text = path.strip(), text.strip()
    origin = f"--set {path}"
    if not equals or not path:
        refuse(f"--set {assignment!r}: expected NAME=VALUE, such as --set projector.dim=4096")
    parts = path.split(".")
    level: type[Settings] = model
    here = into
    for depth, part in enumerate(parts):
        done = ".".join(parts[:depth])
        if part not in level.model_fields:
            _unknown(level, model, done, part, origin)
        field = level.model_fields[part]
        sub = submodel(field.annotation)
        last = depth == len(parts) - 1
        if sub is not None and not last:
            if not isinstance(here.get(part), dict):
                here[part] = {}
            level, here = sub, here[part]
            continue
        if last:
            value: Json
            if _takes(field.annotation, str, Path) and not _takes(field.annotation, int, float, bool):
                listed = text.startswith("[") and any(get_origin(m) is list for m in members(field.annotation))
                none = text in ("", "~", "null") and _takes(field.annotation, type(None))
                value = parse_yaml(text, origin) if listed else None if none else text
            else:
                value = parse_yaml(text, origin)
            _absorb(model, level, {part: value}, origin, here, origins, f"{done}." if done else "")
            return
        if any(get_origin(member) is dict for member in members(field.annotation)) and depth == len(parts) - 2:
            table = here.get(part)
            here[part] = {**(table if isinstance(table, dict) else {}), parts[-1]: parse_yaml(text, origin)}
            origins[".".join(parts[: depth + 1])] = origin
            return
        refuse(f"{origin}: {'.'.join(parts[: depth + 1])!r} has no settings inside; set it as a whole")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(model: type[Settings], error: ValidationError, origins: Mapping[str, str]) -> str:
    """Return a pydantic error as one message: the source, the value, what was expected, and what to do."""
    lines: dict[str, str] = {}  # one per setting, because a union has one error per member
    for problem in sorted(error.errors(include_url=False), key=lambda e: -len(e["loc"])):
        path, level, description = [], model, ""
        inside_model = True
        for part in problem["loc"]:
            if inside_model and isinstance(part, str) and part in level.model_fields:
                field = level.model_fields[part]
                path.append(part)
                description = field.description or ""
                sub = submodel(field.annotation)
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
            flag = flag_for(model, name)
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
    """Build settings from their sources: defaults < `base` < YAML < `flags` < `sets`.

    Args:
        model: The class of the settings.
        yaml_path: A file with settings.
        flags: Dotted name -> value ("train.paths": [...]); None is "not given".
        sets: Texts "a.b=value".
        base: The settings of the run that the command builds on (an audit takes the model of the run that it judges).
        base_name: The file that contains `base`, for messages.
        wanted: The checks of `trust.check` that the caller needs.

    Returns:
        The settings, checked.

    Raises:
        UsageError: A setting is wrong; the message names its source, the setting, its value, and what was expected.

    Example:
        >>> from pipelines.settings.train import EvaluateConfig
        >>> flags = {"model.name": "m", "data.paths": ["test.jsonl"]}
        >>> load_config(EvaluateConfig, None, flags, ["token_budget=512"]).token_budget
        512
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
        refuse(_explain(model, error, origins))
    trust.check(config, origins, wanted)
    return config


def audit_base(
    selected: Path | None, yaml_path: Path | None = None, model: str | None = None
) -> tuple[dict[str, Json], str]:
    """Return the settings that an audit takes from the run whose selected.jsonl it judges.

    The model, target, pool and adapters are those of the run; the training recipe is that of its race (`--verify`) or
    else of its warm-up. An audit that trains another model takes nothing that belongs to the run's: neither its other
    settings, such as the chat template, nor the folder of its features.

    Args:
        selected: The selected.jsonl of the run.
        yaml_path: A file with settings, which may name selected.jsonl and the model instead.
        model: The model that the command names; None if it names none.

    Returns:
        The settings, and the name of the file that contains them; empty if there is no run.
    """
    asked = read_yaml(yaml_path) if yaml_path is not None else {}
    if selected is None:
        named = asked.get("selected")
        selected = Path(named) if isinstance(named, str) else None
    model = model or _name_of_model(asked)
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
    recipe = run.get("training" if run.get("verify") is True else "warmup")
    if isinstance(recipe, dict):
        base["training"] = {name: value for name, value in recipe.items() if name in TrainingConfig.model_fields}
    kept = run.get("features")
    features = kept.get("folder") if isinstance(kept, dict) else None
    if not isinstance(features, str) or not trust.within(Path(features), folder):  # the audit writes there
        features = str(folder / "features")
    if model is not None and not _same_model(model, _name_of_model(base)):
        base["model"], features = {"name": model}, None
    return base | {"out": str(folder / "audit"), "features": features}, str(path)


def _name_of_model(settings: Mapping[str, object]) -> str | None:
    """Return the name in the section `model`, which may be just the name."""
    value = settings.get("model")
    name = value.get("name") if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else None


def _same_model(one: str, other: str | None) -> bool:
    """Return whether two names of models are the same, or lead to the same file or folder."""
    if other is None or one == other:
        return one == other
    paths = [Path(home(name)) for name in (one, other)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def order_base(out: Path | None) -> tuple[dict[str, Json], str]:
    """Return the settings of the run in `out`, which another task of `datatools order` continues.

    Args:
        out: The folder; by default that of the settings.

    Returns:
        The settings, and the name of the file that contains them; empty if there is no run.
    """
    folder = Path(home(str(out or OrderConfig.model_fields["out"].default)))
    path = folder / "run.yaml"
    return ({**read_yaml(path), "out": str(folder)}, str(path)) if path.is_file() else ({}, "")
