"""Results that a run of `datatools order` keeps: the reference run and true retrainings, each computed once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datatools import DataError, files, order
from datatools.files import sealed
from pipelines.engines.units import Job, taken
from pipelines.order.cost import anchors_of
from pipelines.order.setting import Setting
from pipelines.runs import following, workers
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import progress


def reference(setting: Setting, number: int = 0, *, every: bool = False) -> order.ReferenceRun:
    """Return the recorded run of a reference order: made, continued, or read.

    The last one stays in memory, so that the estimators of one run read its anchors once.

    Args:
        setting: The setting of the run.
        number: The number of the reference run.
        every: Whether an anchor is needed at every step.
    """
    anchors = anchors_of(setting, every=every)
    if setting.recorded is None or setting.recorded[0] != (number, anchors):
        setting.recorded = None  # not two of them at a time
        setting.recorded = (number, anchors), _reference(setting, number, anchors)
    return setting.recorded[1]


def _reference(setting: Setting, number: int, anchors: int) -> order.ReferenceRun:
    sequence = setting.sequence if number == 0 else setting.random_orders("reference", number)[number - 1]
    folder = setting.run.path("reference", f"{number:02d}-{anchors}")
    label = f"reference run {number + 1}"
    if workers.helps():
        following.reached(folder.name)
        return order.ReferenceRun.load(folder, setting.device)
    found = _recorded(setting, sequence, folder, label, anchors)
    following.reached(folder.name)
    return found


def _recorded(setting: Setting, sequence: Sequence[int], folder: Path, label: str, anchors: int) -> order.ReferenceRun:
    steps = len(sequence)
    if (folder / "meta.json").is_file():
        with suppress(sealed.Damaged):  # `record` repeats damaged parts
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
    """Warn that a damaged file is computed again.

    Args:
        error: The error of reading it.
    """
    warn(f"{error}; it is computed again")


def kept(path: Path) -> dict[str, Any] | None:
    """Return the result in a file; None if it is missing or damaged, in which case a warning is printed.

    Args:
        path: The file.
    """
    if not path.is_file():
        return None
    try:
        return sealed.read_json(path)
    except sealed.Damaged as error:
        again(error)
        return None


def start(setting: Setting) -> order.Anchor:
    """Return the anchor at which the reference run and every true run begin.

    Args:
        setting: The setting of the run.
    """
    if setting.start is None:
        setting.start = reference(setting).start
    return setting.start


def true_loss(setting: Setting, sequence: Sequence[int], *, seed: int = 0, label: str = "the reference order") -> float:
    """Return the held-out loss after real training in an order; kept in true/, so that it is computed once.

    Args:
        setting: The setting of the run.
        sequence: The order.
        seed: The number of the seed.
        label: The name of the order, for messages.

    Raises:
        Diverged: Training diverges; the message has `label`.
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
            f"real training in {label} diverges: the loss is not finite, so no estimate can be judged; lower "
            f"--learning-rate (now {setting.config.training.learning_rate:g}) or set training.gradient_clip, in "
            "another --out"
        )
    files.make_folder(path.parent)
    took = time.monotonic() - began
    sealed.write_json(path, {"sequence": list(sequence), "seed": seed, "loss": loss, "seconds": took})
    return loss


def prepare(setting: Setting, wanted: Sequence[tuple[Sequence[int], int]]) -> None:
    """Share true retrainings among the members of a team; by itself, a process makes each when its loss is needed.

    Args:
        setting: The setting of the run.
        wanted: The order and the number of the seed of each; two may be equal.
    """
    if workers.member() is None:
        return
    start(setting)  # of the leader's reference run
    runs = list(dict.fromkeys((tuple(sequence), seed) for sequence, seed in wanted))
    paths = [setting.kept("true", "", *one) for one in runs]
    missing = [unit for unit, path in enumerate(paths) if kept(path) is None]
    label = "true retrainings of all workers"
    with progress(label, len(runs), "runs", done=len(runs) - len(missing)) as bar:
        done = setting.run.path("true")
        job = Job("retrainings", done, missing, lambda unit: paths[unit].is_file(), lambda unit: bar.advance())
        for unit in taken(job):
            sequence, seed = runs[unit]
            true_loss(setting, sequence, seed=seed, label=f"run {unit + 1} of {len(runs)}")
            bar.advance()


def true_losses(
    setting: Setting, sequences: Sequence[Sequence[int]], label: str, *, seeds: bool = False
) -> list[float]:
    """Return the held-out losses of several orders.

    Args:
        setting: The setting of the run.
        sequences: The orders.
        label: The label of the progress.
        seeds: Whether the orders are one order under the seeds 0, 1, ...
    """
    found = []
    with setting.run.stage(label), progress(label, len(sequences), "runs") as bar:
        for number, sequence in enumerate(sequences):
            which = f"run {number + 1} of {len(sequences)} ({label})"
            found.append(true_loss(setting, sequence, seed=number if seeds else 0, label=which))
            bar.advance(1, loss=found[-1])
    return found


def record(setting: Setting) -> None:
    """Run the task `record`: record the reference run.

    Args:
        setting: The setting of the run.
    """
    run_ = reference(setting)
    loss = setting.problem.held_out_loss(run_.end.params)
    say(f"reference run: held-out loss {setting.problem.held_out_loss(run_.start.params):.4f} -> {loss:.4f}")
