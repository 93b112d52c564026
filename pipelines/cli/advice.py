"""Advice that fits the command: an error of shared code may name a flag that only other commands have."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipelines.settings import config, config_files
from pipelines.settings.base import Settings

_MODELS: dict[str, type[Settings]] = {
    "select": config.SelectConfig,
    "train": config.TrainConfig,
    "order": config.OrderConfig,
    "evaluate": config.EvaluateConfig,
    "audit": config.AuditConfig,
    "diagnose": config.DiagnoseConfig,
    "demo": config.DemoConfig,
}
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_OTHER_TOOL = re.compile(r"(?:datatools [a-z]+|pip|python|torchrun)\b[^;:`]*$")
_NAMES = {"chat_template": "chat", "lora_rank": "rank", "train": "paths", "data": "paths"}  # where they differ


def fitting(message: str, command: str, flags: Mapping[str, set[str]]) -> str:
    """`message`, and for each flag in it that `command` does not have what stands in its place there.

    Args:
        message: what an error says.
        command: the command that ran.
        flags: command -> its flags.

    Returns: the message; flags of other tools, and those of a `datatools COMMAND` that is named before them, are left.

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
    name = flag.removeprefix("--").replace("-", "_")
    leaf = _NAMES.get(name, name)
    settings = [one for one in _settings(command) if one.rpartition(".")[2] == leaf]
    if settings and "--set" in ours:
        return f"for `datatools {command}`: " + " or ".join(f"--set {one}=..." for one in settings[:3])
    return f"`datatools {command}` has no {flag}"


def _settings(command: str) -> list[str]:
    return config_files.all_names(_MODELS[command]) if command in _MODELS else []
