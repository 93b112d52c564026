"""What a settings file may not decide: whether code runs, and where a command writes.

A run folder may come from somebody else. The models, rows and checkpoints that its run.yaml names are read as data,
also from other folders, because reading runs no code. Two things need a flag of the current command:

- Python code that comes with a model (`trust_remote_code`), or that a model writes (`allow_code_execution`), from any
  YAML file;
- output folders outside the run's folder, and flags such as `overwrite`, from a run's own run.yaml.

Links inside a run folder are refused (`run_files.refuse_special`). Pickles are never loaded, and no flag changes that.
No import here loads torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import UsageError
from pipelines.settings import redaction
from pipelines.settings.base import Settings

CODE, PLACES = "code", "places"
TYPED = "command line"
"""The origin of settings that were given as flags; those given with --set have the origin `--set NAME`."""


def check(config: Settings, origins: Mapping[str, str], wanted: Sequence[str] = (CODE, PLACES)) -> None:
    """Refuse settings that only the command line may contain.

    Args:
        config: The settings.
        origins: Dotted name -> the file or flag that the setting came from.
        wanted: What to check: CODE (no code runs), PLACES (nothing is written elsewhere).

    Raises:
        UsageError: A setting is refused; the message names the file, the setting, and the flag that allows it.
    """
    read = [(name, field, value, _origin(origins, name)) for name, field, value in _leaves(config)]
    read = [part for part in read if part[3] not in ("", TYPED) and not part[3].startswith("--set ")]
    for name, _, value, origin in read if wanted else ():
        if redaction.hidden(value):
            raise UsageError(
                f"{origin}: {name} was a secret, which a run does not save (the file has {redaction.HIDDEN}); give "
                f"the setting again, by its flag or with --set {name}=..."
            )
    for name, _, value, origin in read if CODE in wanted else ():
        if name.endswith("trust_remote_code") and value is True:
            raise UsageError(
                f"{origin}: asks to run Python code that comes with the model ({name}: true), but a file cannot allow "
                "that; if you trust that code, add --trust-remote-code to this command"
            )
        if name.endswith("allow_code_execution") and value is True:
            raise UsageError(
                f"{origin}: asks to run code that a model writes ({name}: true), and a file cannot allow that; to "
                "allow it, add --allow-code-execution to this command"
            )
    for name, field, value, origin in read if PLACES in wanted else ():
        if not _is_record(Path(origin)):
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if extra.get("volatile") and value != field.default:
            raise UsageError(f"{origin}: sets {name}, which only a flag of this command can; remove it from the file")
        if extra.get("elsewhere") and value is not None and not within(Path(str(value)), Path(origin).parent):
            flag = "--out DIR" if name == "out" else f"--set {name}=DIR"
            raise UsageError(
                f"{origin}: has {name}: {value}, which is not inside the folder of the run, and the file of a run "
                f"may not choose another output folder; choose it with {flag}"
            )


def within(path: Path, folder: Path) -> bool:
    """Return whether a path, with all links resolved, is in a folder.

    Args:
        path: The path.
        folder: The folder.
    """
    return path.expanduser().resolve().is_relative_to(folder.resolve())


def _is_record(path: Path) -> bool:
    """Return whether the file belongs to a run, rather than being a settings file that somebody wrote."""
    return path.name == "run.yaml" or (path.parent / "provenance.json").is_file()


def _origin(origins: Mapping[str, str], name: str) -> str:
    """Return where a setting, or the mapping that contains it, came from; "" for a default."""
    while name:
        if name in origins:
            return origins[name]
        name = name.rpartition(".")[0]
    return ""


def _leaves(config: Settings, prefix: str = "") -> Iterator[tuple[str, Any, object]]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, field, value
