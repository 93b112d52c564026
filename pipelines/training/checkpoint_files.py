"""The files of a checkpoint, an adapter or a model that training saves: which are complete, sound, and how they get so.

A folder counts only once `complete.json` (sizes and hashes, written last) stands in it, so that a run that was killed
inside a save continues from the checkpoint before.
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
from pipelines.runs.messages import warn
from pipelines.runs.run_files import COMPLETE as COMPLETE
from pipelines.runs.run_files import changed
from pipelines.runs.workers import rank, world_size


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """What torch, safetensors and peft raise when the disk refuses, as an error that says how to go on."""
    try:
        with quiet():
            yield
    except OSError as error:
        raise files.explain(error, folder, "write") from error
    except (SafetensorError, RuntimeError) as error:  # theirs carry no errno
        first = str(error).strip().splitlines()[0][:200]
        raise EnvironmentProblem(
            f"cannot write {folder}: {first}; check the disk (is it full?) and run the same command again, it "
            "continues from the checkpoint before"
        ) from error


def mark_complete(folder: Path) -> None:
    """Write `complete.json`: size and hash of every file in the checkpoint. Its presence is what makes one valid."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # peft writes a set of names in whatever order it has; equal runs shall have equal bytes
        config = files.read_json(adapter)
        ordered = {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in config.items()}
        files.write_bytes(adapter, files.json_bytes(ordered), seal=False)  # `COMPLETE` has its digest
    found = {p.name: [p.stat().st_size, files.digest_file(p)] for p in sorted(folder.iterdir()) if p.name != COMPLETE}
    files.write_json(folder / COMPLETE, found)


def is_complete(folder: Path) -> bool:
    """Whether every file that `complete.json` lists is there, byte for byte; no when it is damaged itself."""
    try:
        return changed(folder, files.read_json(folder / COMPLETE)) is None
    except (DataError, ValueError):  # missing, not JSON, or not what `mark_complete` wrote
        return False


def is_sound(folder: Path) -> bool:
    """Whether what was saved in `folder` is complete, finite, and here: no link leads out of it."""
    if folder.is_symlink() or (folder.is_dir() and any(path.is_symlink() for path in folder.iterdir())):
        return False
    if not is_complete(folder):
        return False
    if (found := rotten(folder)) is not None:
        warn(f"{folder}: {found} is not finite; what was saved there is not used")
        return False
    return True


def checkpoints(folder: Path, steps: Sequence[int] | None = None) -> list[Path]:
    """The valid checkpoints in `folder`, oldest first; damaged ones are renamed `*.broken` and never used.

    One whose weights or optimizer state are not finite is damaged too, and so is a symbolic link.
    steps: those there should be (`planned_checkpoints`). What comes after the first that is missing is set aside too:
    training goes on before the gap and makes the rest again, bit for bit.
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
    number, aside = 1, path.with_name(f"{path.name}.broken")
    while os.path.lexists(aside):  # the same step may break twice: killed inside its save, and again
        number += 1
        aside = path.with_name(f"{path.name}.broken-{number}")
    files.move(path, aside)


@contextmanager
def lead_first() -> Iterator[None]:
    """Of several processes the first does the block, then the others do: it makes or repairs what they read."""
    if world_size() > 1 and rank() > 0:
        torch.distributed.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        torch.distributed.barrier()
