"""What stops a run from being continued: other settings, changed inputs, damaged files. Each is refused by name."""

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
"""What reading the inputs leaves behind, before anything is made of them."""

OURS = run_files.RECORDS | run_files.OPEN
"""What may lie in a folder that a killed run left before it wrote run.yaml."""

_BEFORE_CHANGE = "before-change-"


def settings(folder: Path, config: Settings, command: str) -> bool:
    """Compare the settings of the run in `folder` with those asked for.

    Args:
        folder: of a run, which holds run.yaml.
        config: the settings asked for.
        command: the command that asks.

    Returns:
        Whether a setting differs that is only read at the end, so that run.yaml must be written again.

    Raises:
        UsageError: The run is of another command or has other settings; says which.

    """
    path = folder / "run.yaml"
    aside = f"choose another --out, or --overwrite to move it to {shown(folder)}.old-N"
    first_line = files.read_bytes(path, limit=1_000_000).decode("utf-8", "replace").partition("\n")[0]
    match = re.match(r"# Replays this run: datatools ([a-z-]+) ", first_line)
    if match and match[1] != command:
        raise UsageError(f"{shown(folder)} holds a run of `datatools {match[1]}`, not {command}; {aside}")
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
            f"{shown(folder)} holds a run with other settings: {'; '.join(named)}{more}. "
            f"Use its settings to continue it, {aside}"
        )
    kept = [as_dict(one, leave_out=("volatile", "elsewhere")) for one in (before, config)]
    return kept[0] != kept[1]


@dataclass
class Changes:
    """What differs from the facts that a run began with, and was accepted."""

    accepted: list[tuple[str, Json, Json]] = field(default_factory=list)
    """Per fact: dotted name, old value, new value."""
    outdated: list[str] = field(default_factory=list)
    """Names of those that what the run has made so far depends on."""


def facts(
    known: Mapping[str, Any],
    now: Mapping[str, Json],
    *,
    accept: Collection[str],
    by_content: Collection[str],
    folder: Path,
) -> Changes:
    """Compare facts about the world with those that a run began with.

    Args:
        known: the facts recorded, by group; groups that are missing are not compared.
        now: the facts of this attempt, by group, flat or nested.
        accept: names, or first parts of names, that may have changed.
        by_content: groups whose results are kept under the content that they were made of.
        folder: of the run, for the message.

    Raises:
        DataError: Something else has changed; names it, with old and new value.

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
            if group not in (*by_content, "code", "numerics"):  # those two: what is there is gone on with
                found.outdated.append(name)
    if refused:
        named = [f"{name} was {_value(was)}, is {_value(is_)}" for _, name, was, is_ in refused[:4]]
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        flags = " ".join(f"--accept-change {group}" for group in dict.fromkeys(group for group, *_ in refused))
        raise DataError(
            f"changed since the run in {shown(folder)} began: {'; '.join(named)}{more}. Restore it{_how(refused)}, "
            f"start again with another --out or --overwrite, or continue in spite of it with {flags}"
        )
    return found


def _how(refused: Sequence[tuple[str, str, Json, Json]]) -> str:
    """How to restore what was refused, where that is not obvious."""
    threads = next((was for _, name, was, _ in refused if name == "numerics.threads"), None)
    if threads is None:
        return ""
    return f" (OMP_NUM_THREADS={threads} does so for threads; torchrun sets it to 1 where nobody else does)"


def set_results_aside(folder: Path, changed: Sequence[str]) -> bool:
    """Move what the run has made so far to `before-change-N` in its folder, except for what was read just now.

    Args:
        folder: of the run.
        changed: names of what has changed, for the message.

    Returns:
        Whether there was anything to move.

    """
    kept = OURS | INPUTS
    names = [entry.name for entry in sorted(folder.iterdir()) if entry.name not in kept]
    names = [name for name in names if not name.startswith((_BEFORE_CHANGE, seals.TEMPORARY))]
    if not names:
        return False
    number = 1
    while (aside := folder / f"{_BEFORE_CHANGE}{number}").exists():
        number += 1
    files.make_folder(aside)
    for name in names:
        files.move(folder / name, aside / name)
    say(f"{', '.join(changed[:3])} changed: what was made before is in {shown(aside)}, and is made again")
    return True


def contents(folder: Path, yaml: str, *, accept: Collection[str]) -> list[str]:
    """Compare the files of the run in `folder` with their seals, before any of them is believed.

    A damaged result is set aside and made again.

    Args:
        folder: of the run.
        yaml: what run.yaml holds with the settings asked for; it replaces a damaged one that held the same.
        accept: may hold "seals", to take all files as they are.

    Returns:
        Names of the files that were set aside.

    Raises:
        DataError: A record was damaged or edited, which nothing could make again.

    """
    if "seals" in accept:
        run_files.adopt(folder)
        return []
    if not run_files.is_sealed(folder):
        say(
            f"the run in {shown(folder)} is of a version without seals: its files are taken as they are, and "
            "sealed from now on"
        )
        run_files.adopt(folder)
        return []
    lost = []
    for name in run_files.damaged(folder):
        path = folder / name
        if name == "run.yaml" and _was(path, text := yaml.encode()):
            files.write_bytes(path, text)
            say(f"{shown(path)} was damaged or edited; it is written again, with the settings that ran")
        elif name in run_files.RECORDS:
            raise DataError(f"{seals.refusal(path)}, or start again with --overwrite")
        else:
            run_files.set_aside(path)
            lost.append(name)
            say(
                f"{shown(path)} is not what the run wrote (damaged or edited): set aside as "
                f"{shown(path.name)}.damaged, and made again"
            )
    return lost


def _was(path: Path, text: bytes) -> bool:
    """Whether the seals of `path` say that it held `text`."""
    return bool(text) and seals.Seal(len(text), files.digest(text)) in seals.expected(path)


def _value(value: Json) -> str:
    text = visible(json.dumps(value, ensure_ascii=False)) if value is not None else "none"
    return text if len(text) <= 60 else text[:57] + "..."
