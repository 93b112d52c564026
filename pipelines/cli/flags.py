"""Parameters for typer, made from the flags of settings, and the options that every command has."""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.settings.base import Settings
from pipelines.settings.flags import Setting, flags_of, parameter_name
from pipelines.settings.marks import RUN


def parameter(name: str, annotation: Any, info: Any, default: Any = None) -> inspect.Parameter:
    """Return one parameter of a command, which is an option or an argument.

    Args:
        name: The name of the parameter.
        annotation: The type of its value.
        info: The description for typer.
        default: The default value.
    """
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def option(flag: str, annotation: Any, text: str, panel: str = RUN, **more: Any) -> inspect.Parameter:
    """Return an option. Its default is None ("not given") or False, because settings define the real defaults.

    Args:
        flag: The flag, such as "--seed".
        annotation: The type of its value.
        text: The help text.
        panel: The heading of help under which the option is listed.
        **more: Further arguments of `typer.Option`.
    """
    shown = more.pop("show_default", False)
    info = typer.Option(flag, help=text, rich_help_panel=panel, show_default=shown, **more)
    return parameter(parameter_name(flag), annotation, info, False if annotation is bool else None)


def argument(name: str, annotation: Any, metavar: str, text: str, *, required: bool = False) -> inspect.Parameter:
    """Return a positional argument.

    Args:
        name: The name of the parameter.
        annotation: The type of its value.
        metavar: The name that help shows.
        text: The help text.
        required: Whether the argument must be given.
    """
    info = typer.Argument(metavar=metavar, help=text, show_default=False)
    return parameter(name, annotation, info, inspect.Parameter.empty if required else None)


YAML = argument("yaml", Path | None, "YAML", "a file with settings; the run.yaml of a run repeats that run")
CONFIG = option("--config", Path | None, "the same as YAML, as an option", metavar="YAML")
COMMON = (
    option(
        "--set",
        list[str] | None,
        "any other setting, such as projector.dim=4096; --print-config lists them; may be repeated",
        metavar="A.B=C",
    ),
    option("--print-config", bool, "print every setting with its meaning and exit"),
    option("--quiet", bool, "show only warnings and errors"),
)


def of_settings(model: type[Settings]) -> list[inspect.Parameter]:
    """Return the options for the flags of a command.

    Args:
        model: The settings of the command.
    """
    return [_of_setting(setting) for setting in flags_of(model)]


def _of_setting(setting: Setting) -> inspect.Parameter:
    flag = setting.flag
    if setting.kind is bool:
        return option(flag.name, bool, _help(setting), flag.panel)
    one: Any = str if setting.kind is Path else setting.kind  # a Path would lose the second slash of a URL
    annotation = list[one] | None if setting.repeats else one | None
    return option(
        flag.name,
        annotation,
        _help(setting),
        flag.panel,
        metavar=flag.metavar,
        show_default=setting.default or False,
    )


def _help(setting: Setting) -> str:
    """Return the description of the field, with the facts that its type adds."""
    text = setting.help.replace("`", "")
    # None is "null" in YAML; on the command line it means that the flag was not given
    text = re.sub(r"\bnull (?=\w+s\b)", "by default it ", re.sub(r"\bnull is ", "by default ", text))
    if not all(name in text for name in setting.choices) and "datatools ls " not in text:
        text += f": {', '.join(setting.choices)}" if setting.listed else f"; one of {', '.join(setting.choices)}"
    if setting.listed:
        text += "; comma-separated"
    return f"{text}; may be repeated" if setting.repeats else text


def with_parameters(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Return a function with the parameters that typer reads.

    Args:
        function: A function that takes a mapping of all parameters.
        parameters: The parameters.
    """

    def command(**given: Any) -> None:
        function(given)

    command.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
