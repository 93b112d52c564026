"""All settings of a command as a table, for the documentation."""

from collections.abc import Iterator

from pydantic_core import PydanticUndefined

from pipelines.settings.base import Settings
from pipelines.settings.dump import flow
from pipelines.settings.flags import flags_of, submodel


def rows(model: type[Settings]) -> list[tuple[str, str, str, str]]:
    """Return the settings of a command as rows of a table.

    Args:
        model: The settings of the command.

    Returns:
        (name, flag, default, meaning) of each setting, in the order of --print-config. The flag is "" if only `--set`
        and YAML reach the setting, and the default is "" if there is none.

    Example:
        >>> from pipelines.settings.select import SelectConfig
        >>> next(row[:3] for row in rows(SelectConfig) if row[0] == "warmup.epochs")
        ('warmup.epochs', '--epochs', '4')
    """
    flags = {path: setting.flag.name for setting in flags_of(model) for path in setting.paths}
    return [(name, flags.get(name, ""), default, meaning) for name, default, meaning in _leaves(model, "")]


def _leaves(model: type[Settings], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, info in model.model_fields.items():
        section = submodel(info.annotation)
        if section is not None:
            yield prefix + name, "null" if info.default is None else "", info.description or ""
            yield from _leaves(section, f"{prefix}{name}.")
        else:
            yield prefix + name, "" if info.default is PydanticUndefined else flow(info.default), info.description or ""
