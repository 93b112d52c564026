"""A command's own code on what a caller holds in memory: rows and a model are lent to it, its folder is thrown away.

`pipelines.select.in_memory` and the functions beside it make settings, run the command in a `session`, and read its
results back as values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatools import DatatoolsError, UsageError, files
from pipelines.models import borrowed
from pipelines.rows import in_memory
from pipelines.runs import current
from pipelines.runs.messages import quietly
from pipelines.runs.redact import called_as
from pipelines.settings.base import Settings
from pipelines.settings.flags import flag_for
from pipelines.settings.load import all_names

NAME = "model in memory"
"""What a model is called that does not say what it was loaded from."""


@dataclass(frozen=True)
class Session:
    """Where a command works, and what it calls the model."""

    folder: Path
    model: str

    def settings(
        self, arguments: Mapping[str, str], values: Mapping[str, Any], others: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The settings of a call, by dotted name; an argument that is None is left to the default of its setting.

        Args:
            arguments: Dotted names of settings -> the arguments that stand for them.
            values: Arguments -> what was given for them.
            others: Other settings, by dotted name or as nested mappings.

        Raises:
            UsageError: A setting is given twice, here and as an argument.
        """
        found = {name: values[argument] for name, argument in arguments.items() if values.get(argument) is not None}
        for name, value in (others or {}).items():
            if name in arguments:
                raise UsageError(f"settings has {name!r}, which is the argument {arguments[name]}")
            found[name] = value
        return found


@contextmanager
def session(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, in_memory.Held],
    settings: type[Settings],
    *,
    out: str | os.PathLike[str] | None,
    call: str,
    arguments: Mapping[str, str],
    verbose: bool,
    trains: bool = True,
) -> Iterator[Session]:
    """Inside, a command finds the caller's model and rows; afterwards they are as they were.

    Args:
        model: See `borrowed.lent`.
        tokenizer: See `borrowed.lent`.
        rows: The name of an input -> its rows, which settings call `memory:NAME`.
        settings: The settings of the command, whose flags messages name.
        out: The folder of the run; None is one that is thrown away.
        call: The function that was called, for the report.
        arguments: Dotted names of settings -> the arguments of the caller's function that stand for them.
        verbose: Show progress and news, and not only warnings.
        trains: See `borrowed.lent`.

    Raises:
        UsageError: The model or the tokenizer cannot be used; so are those of the command, its flags as arguments.
    """
    with ExitStack() as stack:
        stack.enter_context(_in_arguments(settings, arguments))
        stack.enter_context(quietly(not verbose))
        stack.enter_context(called_as(call))
        before = current.last_folder()
        stack.callback(current.opened, before)
        stack.enter_context(in_memory.lending(rows))
        named = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
        name = str(named) if named else NAME
        stack.enter_context(borrowed.lent(model, tokenizer, name, trains=trains))
        folder = Path(os.fspath(out)) if out is not None else stack.enter_context(files.scratch_folder()) / "run"
        yield Session(folder, name)


@contextmanager
def _in_arguments(settings: type[Settings], arguments: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a flag of the command line name what a caller writes in its place."""
    try:
        yield
    except DatatoolsError as error:
        flags = {flag: name for name in all_names(settings) if (flag := flag_for(settings, name))}

        def written(found: re.Match[str]) -> str:
            name = flags.get(found[1])
            if found[1] == "--set":
                return "settings="
            if name is None:
                return found[0]
            argument = arguments.get(name, f'settings["{name}"]')
            return f"{argument}=" if found[2] else argument

        text = re.sub(r"(?<![\w-])(--[a-z][a-z-]*)( (?=[A-Z]))?", written, str(error))
        if text == str(error):
            raise
        error.args = (text, *error.args[1:])  # the error itself: its type may need more than a text
        raise
