"""What a run of `datatools order` keeps: the recorded reference run, and true retrainings, each done once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datatools import DataError, files, order
from datatools.files import sealed
from pipelines.order.cost import anchors_of
from pipelines.order.setting import Setting
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import progress


def reference(setting: Setting, number: int = 0, *, every: bool = False) -> order.ReferenceRun:
    """The recorded run of a reference order: made, or continued, or read; `every` asks for an anchor at every step."""
    steps, anchors = len(setting.sequence), anchors_of(setting, every=every)
    sequence = setting.sequence if number == 0 else setting.random_orders("reference", number)[number - 1]
    folder = setting.run.path("reference", f"{number:02d}-{anchors}")
    label = f"reference run {number + 1}"
    if (folder / "meta.json").is_file():
        with suppress(sealed.Damaged):  # `record` meets what is damaged, and makes it again
            found = order.ReferenceRun.load(folder, setting.device)
            found.check_same(setting.facts, "this run's")
            return found
    with setting.run.stage(label), progress(label, steps, "steps") as bar:
        params, states = setting.begin(0)
        done = [0]

        def observe(position: int) -> None:
            bar.advance(position - done[0])
            done[0] = position

        return order.record(
            setting.problem, setting.recipe, sequence, params, states,
            anchors=anchors, folder=folder, facts=setting.facts, observe=observe, damaged=again,
        )  # fmt: skip


def again(error: DataError) -> None:
    """Say that a damaged file is made again."""
    warn(f"{error}; it is made again")


def kept(path: Path) -> dict[str, Any] | None:
    """The result in a file; None where there is none, or one that does not hold what was written, which is said."""
    if not path.is_file():
        return None
    try:
        return sealed.read_json(path)
    except sealed.Damaged as error:
        again(error)
        return None


def start(setting: Setting) -> order.Anchor:
    """Where the reference run and every true run begin."""
    if setting.start is None:
        setting.start = reference(setting).start
    return setting.start


def true_loss(setting: Setting, sequence: Sequence[int], *, seed: int = 0, label: str = "the reference order") -> float:
    """The held-out loss after training in an order for real; kept in true/, so that it is done once.

    Raises:
        Diverged: (a DataError) with `label`, where training diverges.
    """
    path = setting.kept("true", "", tuple(sequence), seed)
    found = kept(path)
    if found is not None and found.get("sequence") == list(sequence) and found.get("seed") == seed:
        return float(found["loss"])
    began = time.monotonic()
    if seed == 0:
        params, states = start(setting).params, start(setting).states
    else:
        params, fresh = setting.begin(seed)
        states = setting.recipe.init(params) if fresh is None else fresh
    try:
        end, _ = order.train(setting.problem, setting.recipe, sequence, params, states)
        loss: float = setting.problem.held_out_loss(end)
    except order.Diverged:
        loss = math.nan
    if not math.isfinite(loss):
        raise order.Diverged(
            f"training in {label} for real diverges: the loss is not finite. No estimate can be judged by it; lower "
            f"--learning-rate (now {setting.config.training.learning_rate:g}) or set training.gradient_clip, in "
            "another --out"
        )
    files.make_folder(path.parent)
    took = time.monotonic() - began
    sealed.write_json(path, {"sequence": list(sequence), "seed": seed, "loss": loss, "seconds": took})
    return loss


def true_losses(
    setting: Setting, sequences: Sequence[Sequence[int]], label: str, *, seeds: bool = False
) -> list[float]:
    """Of several orders; with seeds, of one order under the seeds 0, 1, ..."""
    found = []
    with setting.run.stage(label), progress(label, len(sequences), "runs") as bar:
        for number, sequence in enumerate(sequences):
            which = f"run {number + 1} of {len(sequences)} ({label})"
            found.append(true_loss(setting, sequence, seed=number if seeds else 0, label=which))
            bar.advance(1, loss=found[-1])
    return found


def record(setting: Setting) -> None:
    """The task `record`."""
    run_ = reference(setting)
    loss = setting.problem.held_out_loss(run_.end.params)
    say(f"reference run: held-out loss {setting.problem.held_out_loss(run_.start.params):.4f} -> {loss:.4f}")
