"""Advice that fits the command: an error of shared code may name a flag that only other commands have."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipelines.cli.commands import COMMANDS
from pipelines.settings.base import Settings
from pipelines.settings.flags import flags_of
from pipelines.settings.load import all_names

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_OTHER_TOOL = re.compile(r"(?:datatools [a-z]+|pip|python|torchrun)\b[^;:`]*$")


def fitting(message: str, command: str, flags: Mapping[str, set[str]]) -> str:
    """Add to a message which setting to use instead of each flag that the command does not have.

    Args:
        message: The message of an error.
        command: The command that ran.
        flags: Command -> its flags.

    Returns:
        The message. Flags of other tools and of a `datatools COMMAND` that is named before them are not changed.
    """
    if command not in flags:
        return message
    ours, every = flags[command], set().union(*flags.values())
    notes: dict[str, str] = {}
    for found in _FLAG.finditer(message):
        flag = found[0]
        if flag in every and flag not in ours and not _OTHER_TOOL.search(message[: found.start()]):
            notes[flag] = _instead(flag, command, ours)
    return message + "".join(f" ({note})" for note in notes.values())


def _instead(flag: str, command: str, ours: set[str]) -> str:
    if command == "explain":
        return f"{flag} is a setting of the run that explain reads: give it to `datatools select`"
    leaves = {path.rpartition(".")[2] for one in COMMANDS.values() for path in _paths(one.settings, flag)}
    settings = [name for name in _settings(command) if name.rpartition(".")[2] in leaves]
    if settings and "--set" in ours:
        return f"for `datatools {command}`: " + " or ".join(f"--set {one}=..." for one in settings[:3])
    return f"`datatools {command}` has no {flag}"


def _paths(model: type[Settings], flag: str) -> tuple[str, ...]:
    """Return the settings that `flag` sets in the command of `model`."""
    return next((setting.paths for setting in flags_of(model) if setting.flag.name == flag), ())


def _settings(command: str) -> list[str]:
    return all_names(COMMANDS[command].settings) if command in COMMANDS else []
