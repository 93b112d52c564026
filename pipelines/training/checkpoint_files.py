"""The files of a saved checkpoint, adapter or model: which are complete and sound.

A folder is valid only if it contains `complete.json` (sizes and hashes, written last), so that a run that was killed
during a save continues from the previous checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from datatools import DataError, EnvironmentProblem, files
from pipelines.models.finite import rotten
from pipelines.models.quiet import quiet
from pipelines.runs import current, numerics
from pipelines.runs.messages import warn
from pipelines.runs.run_files import COMPLETE as COMPLETE
from pipelines.runs.run_files import changed
from pipelines.runs.workers import rank, world_size

NUMERICS = "numerics.json"
"""The file of a checkpoint that says with what it was computed: `numerics.facts`."""


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Convert errors of torch, safetensors and peft while a folder is saved into errors that say how to continue.

    Args:
        folder: The folder.
    """
    try:
        with quiet():
            yield
    except OSError as error:
        raise files.explain(error, folder, "write") from error
    except (SafetensorError, RuntimeError) as error:  # theirs carry no errno
        first = str(error).strip().splitlines()[0][:200]
        raise EnvironmentProblem(
            f"cannot write {folder}: {first}; check the free disk space and run the same command again, which "
            "continues from the previous checkpoint"
        ) from error


def mark_complete(folder: Path) -> None:
    """Write `complete.json`: size and hash of every file in a folder. Its presence makes the folder valid.

    Args:
        folder: The folder.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # peft writes a set of names in any order; equal runs must have equal bytes
        config = files.read_json(adapter)
        ordered = {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in config.items()}
        files.write_bytes(adapter, files.json_bytes(ordered), seal=False)  # `COMPLETE` has its digest
    found = {p.name: [p.stat().st_size, files.digest_file(p)] for p in sorted(folder.iterdir()) if p.name != COMPLETE}
    files.write_json(folder / COMPLETE, found)


def check_numerics(folder: Path) -> None:
    """Compare what computed the checkpoint in `folder` with what computes now.

    Where the user has accepted the change for the whole run, it is only said.

    Args:
        folder: Of a checkpoint that is sound; that of an earlier version says nothing.

    Raises:
        DataError: Something differs; names it, with both values.
    """
    path = folder / NUMERICS
    if not path.is_file():
        return
    made = files.read_json(path)
    if not (differing := numerics.differences(made if isinstance(made, dict) else {}, numerics.facts())):
        return
    run = current.run()
    if run is not None and run.accepts(numerics.GROUP):
        warn(f"{folder} was computed with other numerics, and training goes on from it all the same: {differing}")
        return
    raise DataError(
        f"{folder} was computed with other numerics than those of this process ({differing}), so that its end would be "
        f"neither run's; restore them, remove {folder.parent} to train from the start, or go on in spite of it with "
        f"--accept-change {numerics.GROUP}"
    )


def is_complete(folder: Path) -> bool:
    """Return whether every file listed in `complete.json` exists, byte for byte; False if the list itself is damaged.

    Args:
        folder: The folder.
    """
    try:
        return changed(folder, files.read_json(folder / COMPLETE)) is None
    except (DataError, ValueError):  # missing, not JSON, or not what `mark_complete` wrote
        return False


def is_sound(folder: Path) -> bool:
    """Return whether a saved folder is complete and finite and contains no link.

    Args:
        folder: The folder.
    """
    if folder.is_symlink() or (folder.is_dir() and any(path.is_symlink() for path in folder.iterdir())):
        return False
    if not is_complete(folder):
        return False
    if (found := rotten(folder)) is not None:
        warn(f"{folder}: {found} is not finite; the saved files are not used")
        return False
    return True


def checkpoints(folder: Path, steps: Sequence[int] | None = None) -> list[Path]:
    """Return the valid checkpoints in a folder, oldest first; damaged ones are renamed to `*.broken` and never used.

    A checkpoint is damaged too if its weights or optimizer state are not finite, or if it is a symbolic link.

    Args:
        folder: The folder of the checkpoints.
        steps: The expected steps (`planned_checkpoints`). Checkpoints after the first missing one are renamed too:
            training continues before the gap and repeats the rest, bit for bit.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            if is_sound(path):
                found.append((int(step), path))
            else:
                _set_aside(path)
    found.sort()
    if steps is not None:
        sound = 0
        while sound < min(len(found), len(steps)) and found[sound][0] == steps[sound]:
            sound += 1
        for _, path in found[sound:]:
            _set_aside(path)
        found = found[:sound]
    return [path for _, path in found]


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.broken")
    if os.path.lexists(aside):  # the same step may break twice
        aside = files.free_name(aside, first=2)
    files.move(path, aside)


@contextmanager
def lead_first() -> Iterator[None]:
    """Let the first of several processes run the `with` block before the others, which read its files."""
    if world_size() > 1 and rank() > 0:
        torch.distributed.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        torch.distributed.barrier()
