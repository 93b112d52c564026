"""Folders that a run may use: their other content, and how an earlier run is moved out of the way."""

import os
from contextlib import suppress
from pathlib import Path

from datatools import EnvironmentProblem, UsageError, files
from datatools.files import seals
from pipelines.runs.check import INPUTS, OURS
from pipelines.runs.events import PROGRESS, read_progress
from pipelines.runs.messages import say
from pipelines.runs.run_files import shown
from pipelines.texts import visible


def refuse_odd(folder: Path) -> None:
    """Refuse a folder that cannot be a run folder.

    Args:
        folder: The folder that --out names.

    Raises:
        UsageError: The name has unreadable characters, the folder is the home folder or the root, or it is a file.
        EnvironmentProblem: The folder cannot be written to.
    """
    if visible(str(folder)) != str(folder):
        raise UsageError(
            f"--out {shown(folder)}: the name contains invisible characters or bytes that are not UTF-8; "
            "choose another name"
        )
    with suppress(OSError, RuntimeError, ValueError):
        if folder.resolve() in (Path("/"), Path.home().resolve()):
            raise UsageError(f"--out {shown(folder)}: a run needs a folder of its own; name one inside it")
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {shown(folder)} is a file; expected a new folder or the folder of an earlier run")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise EnvironmentProblem(f"--out {shown(folder)}: no permission to write there; choose another folder")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, no permission above it
        reason = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(f"--out {shown(folder)}: {reason}; choose another folder") from error


def foreign(folder: Path) -> list[str]:
    """Return the names in a folder that are neither records of a run nor leftovers of a killed process.

    Args:
        folder: The folder.
    """
    names = [entry.name for entry in folder.iterdir() if entry.name not in OURS]
    return [name for name in names if not name.startswith(seals.TEMPORARY)]


def failed_early(folder: Path, *, forget: bool) -> bool:
    """Return whether the run in a folder failed before it computed anything (because of a mistake in the command).

    The corrected command may then use the same folder.

    Args:
        folder: The folder of a run.
        forget: Whether to remove the traces of such a run.
    """
    if set(foreign(folder)) - INPUTS or not (folder / PROGRESS).is_file():
        return False
    if read_progress(folder).get("state") != "failed":
        return False
    for name in ("run.yaml", "provenance.json", "events.jsonl", seals.NAME) if forget else ():
        if (folder / name).exists():
            files.remove(folder / name)
    return True


def refuse_to_move(folder: Path) -> bool:
    """Refuse to move a folder aside that does not belong to a run, or that is the current folder.

    Args:
        folder: The folder.

    Returns:
        Whether there is a run to move.

    Raises:
        UsageError: The folder contains something else, or is the current folder or one of its parents.
    """
    if not (folder / "run.yaml").is_file():
        if foreign(folder):
            raise UsageError(
                f"--overwrite: {shown(folder)} contains no run (no run.yaml) and is not moved; "
                "choose another --out, or move it yourself"
            )
        return False
    here = Path.cwd().resolve()
    if folder.resolve() in (here, *here.parents):
        raise UsageError(
            f"--overwrite: {shown(folder)} is the current folder or contains it; run the command from another folder"
        )
    return True


def move_aside(folder: Path) -> None:
    """Move the run in a folder to `FOLDER.old-N`, and print the new name.

    Args:
        folder: The folder of the run.

    Raises:
        UsageError: As in `refuse_to_move`.
        EnvironmentProblem: Another process uses the folder.
    """
    if not refuse_to_move(folder):
        return
    with files.lock_folder(folder):
        aside = files.free_name(folder.with_name(f"{folder.name}.old"))
        files.move(folder, aside)
    files.remove(aside / ".lock")
    say(f"moved the earlier run to {aside}")
