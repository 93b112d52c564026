"""Checks before a run continues: other settings, changed inputs and damaged files are refused by name."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatools import DataError, UsageError, files
from datatools.files import seals
from pipelines.runs import run_files
from pipelines.runs.messages import say
from pipelines.runs.run_files import shown
from pipelines.settings.base import Json, Settings
from pipelines.settings.dump import as_dict, fingerprint, flatten
from pipelines.settings.load import load_config
from pipelines.texts import visible

INPUTS = {"inputs", "bad_rows.jsonl", "quarantine.jsonl"}
"""Files that reading the inputs leaves in the folder, before any result is computed."""

OURS = run_files.RECORDS | run_files.OPEN
"""Files that a run may leave in its folder if it is killed before it writes run.yaml."""

_BEFORE_CHANGE = "before-change"


def settings(folder: Path, config: Settings, command: str) -> bool:
    """Compare the settings of an existing run with the requested settings.

    Args:
        folder: The folder of the run, which contains run.yaml.
        config: The requested settings.
        command: The command that requests them.

    Returns:
        Whether a setting differs that is only read at the end, so that run.yaml must be written again.

    Raises:
        UsageError: The run belongs to another command or has other settings; the message names them.
    """
    path = folder / "run.yaml"
    aside = f"choose another --out, or use --overwrite to move the run to {shown(folder)}.old-N"
    first_line = files.read_bytes(path, limit=1_000_000).decode("utf-8", "replace").partition("\n")[0]
    match = re.match(r"# Replays this run: datatools ([a-z-]+) ", first_line)
    if match and match[1] != command:
        raise UsageError(f"{shown(folder)} contains a run of `datatools {match[1]}`, not of {command}; {aside}")
    try:
        before = load_config(type(config), path, wanted=())  # only compared with what was asked for
    except UsageError as error:
        raise UsageError(f"the run in {shown(folder)} cannot be continued: {error}; {aside}") from error
    old, new = fingerprint(before), fingerprint(config)
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        named = [f"{n} was {_value(old.get(n))}, is {_value(new.get(n))}" for n in differing[:5]]
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UsageError(
            f"{shown(folder)} contains a run with other settings: {'; '.join(named)}{more}. "
            f"Use the same settings to continue the run (as `datatools {command} {shown(path)}` does), or {aside}"
        )
    kept = [as_dict(one, leave_out=("volatile", "elsewhere")) for one in (before, config)]
    return kept[0] != kept[1]


@dataclass
class Changes:
    """Accepted differences from the facts that were recorded when the run began."""

    accepted: list[tuple[str, Json, Json]] = field(default_factory=list)
    """Per fact: dotted name, old value, new value."""
    outdated: list[str] = field(default_factory=list)
    """Names of the changed facts on which existing results depend."""


def facts(
    known: Mapping[str, Any],
    now: Mapping[str, Json],
    *,
    accept: Collection[str],
    by_content: Collection[str],
    folder: Path,
) -> Changes:
    """Compare facts about the environment with the facts that were recorded when the run began.

    Args:
        known: The recorded facts, by group. Groups that were not recorded are not compared.
        now: The facts of this attempt, by group, flat or nested.
        accept: Names, or first parts of names, that may have changed.
        by_content: Groups whose results are stored by the content that they were computed from.
        folder: The folder of the run, for the message.

    Returns:
        The accepted changes.

    Raises:
        DataError: Another fact has changed; the message gives its name, the old value and the new value.
    """
    found, refused = Changes(), []
    for group, value in now.items():
        new = {(group, part): v for part, v in flatten(value).items()}
        stored = flatten(known[group]) if group in known else {}
        old = {(group, part): v for part, v in stored.items()}
        for key in {**old, **new}:
            was, is_ = old.get(key), new.get(key)
            if group not in known or was == is_:
                continue
            name = ".".join(part for part in key if part)
            if not {name, group} & set(accept):
                refused.append((group, name, was, is_))
                continue
            found.accepted.append((name, was, is_))
            if group not in (*by_content, "code", "numerics"):  # existing results stay valid for those two
                found.outdated.append(name)
    if refused:
        named = [f"{name} was {_value(was)}, is {_value(is_)}" for _, name, was, is_ in refused[:4]]
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        flags = " ".join(f"--accept-change {group}" for group in dict.fromkeys(group for group, *_ in refused))
        raise DataError(
            f"changed since the run in {shown(folder)} began: {'; '.join(named)}{more}. Restore it{_how(refused)}, "
            f"start again with another --out or --overwrite, or continue despite the change with {flags}"
        )
    return found


def _how(refused: Sequence[tuple[str, str, Json, Json]]) -> str:
    """Return how to restore a refused fact, where that is not obvious."""
    before = {name: was for _, name, was, _ in refused}
    ways = []
    if (threads := before.get("numerics.threads")) is not None:
        ways.append(f"set OMP_NUM_THREADS={threads} for threads; torchrun sets it to 1 if it is not set")
    if "numerics.processes" in before:
        processes = before["numerics.processes"]
        how = "start it without torchrun" if processes is None else f"use torchrun --nproc-per-node {processes}"
        ways.append(f"{how} for processes")
    return f" ({'; '.join(ways)})" if ways else ""


def set_results_aside(folder: Path, changed: Sequence[str]) -> bool:
    """Move the existing results of a run to `before-change-N` in its folder, except for the inputs that were just read.

    Args:
        folder: The folder of the run.
        changed: Names of the changed facts, for the message.

    Returns:
        Whether there was anything to move.
    """
    kept = OURS | INPUTS
    names = [entry.name for entry in sorted(folder.iterdir()) if entry.name not in kept]
    names = [name for name in names if not name.startswith((f"{_BEFORE_CHANGE}-", seals.TEMPORARY))]
    if not names:
        return False
    aside = files.make_folder(files.free_name(folder / _BEFORE_CHANGE))
    for name in names:
        files.move(folder / name, aside / name)
    say(f"{', '.join(changed[:3])} changed: the earlier results are in {shown(aside)} and are computed again")
    return True


def contents(folder: Path, yaml: str, *, accept: Collection[str]) -> list[str]:
    """Compare the files of a run with their seals before any of them is used.

    A damaged result is set aside and computed again.

    Args:
        folder: The folder of the run.
        yaml: The content of run.yaml for the requested settings. It replaces a damaged file that had the same content.
        accept: May contain "seals", to take all files as they are.

    Returns:
        Names of the files that were set aside.

    Raises:
        DataError: A record was damaged or edited, and cannot be computed again.
    """
    if "seals" in accept:
        run_files.adopt(folder)
        return []
    if not run_files.is_sealed(folder):
        say(
            f"the run in {shown(folder)} was written by a version without seals: its files are taken as they are and "
            "sealed from now on"
        )
        run_files.adopt(folder)
        return []
    lost = []
    for name in run_files.damaged(folder):
        path = folder / name
        if name == "run.yaml" and _was(path, text := yaml.encode()):
            files.write_bytes(path, text)
            say(f"{shown(path)} was damaged or edited; it is written again with the settings of the run")
        elif name in run_files.RECORDS:
            raise DataError(f"{seals.refusal(path)}, or start again with --overwrite")
        else:
            run_files.set_aside(path)
            lost.append(name)
            say(
                f"{shown(path)} differs from what the run wrote (damaged or edited): it is set aside as "
                f"{shown(path.name)}.damaged and computed again"
            )
    return lost


def _was(path: Path, text: bytes) -> bool:
    """Return whether the seals of `path` show that it contained `text`."""
    return bool(text) and seals.Seal(len(text), files.digest(text)) in seals.expected(path)


def _value(value: Json) -> str:
    text = visible(json.dumps(value, ensure_ascii=False)) if value is not None else "none"
    return text if len(text) <= 60 else text[:57] + "..."
