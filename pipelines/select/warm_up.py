"""The warm-up of LESS: a short training run on a random share of the pool whose checkpoints the gradients use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from datatools import DataError, UsageError, files
from pipelines.models.base import unload
from pipelines.models.lora import add_lora
from pipelines.runs import following, workers
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.select.scored import Context
from pipelines.settings.methods import known
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoint_files, checkpoints, fit


def warm_up_rows(context: Context) -> list[int]:
    """Return the pool rows of the warm-up: those it began with, or a random share drawn by content.

    A pool that has grown since then keeps the rows of its warm-up, and so its checkpoints.

    Args:
        context: What is scored.

    Raises:
        DataError: Some of these rows are no longer in the pool, and the user has not accepted that the data changed.
            Once this is accepted, everything made from the old pool is set aside, and rows are drawn from the new one.
    """
    config, pool = context.config, context.pool
    manifest = context.run.path("warmup", "rows.json")
    if manifest.is_file():
        by_key = {key: i for i, key in enumerate(pool.keys) if key}
        recorded = files.read_json(manifest)["keys"]
        gone = [key for key in recorded if key not in by_key]
        if not gone:
            return [by_key[key] for key in recorded]
        if not any(name.partition(".")[0] == "data" for name in config.accept_change):
            raise DataError(
                f"{len(gone)} of {len(recorded)} warm-up rows are no longer in the pool; "
                "--accept-change data makes the warm-up again and all that follows from it, --overwrite the whole run"
            )
        context.run.set_aside([f"the pool, which has lost {len(gone)} of {len(recorded)} warm-up rows,"])
    usable = np.flatnonzero(pool.usable)
    count = min(len(usable), max(config.warmup.minimum_rows, int(config.warmup.fraction * len(usable) + 1e-9)))
    # by content, so that the order of the input files does not change the sample
    ordered = sorted(usable.tolist(), key=lambda i: pool.keys[i])
    generator = np.random.Generator(np.random.Philox(derive_seed(config.seed, "warm-up rows")))
    return [ordered[i] for i in generator.permutation(len(ordered))[:count]]


def warm_up(context: Context) -> tuple[list[checkpoints.Checkpoint], int]:
    """Return the checkpoints for the gradients (the user's, or those of the warm-up) and the tokens of the warm-up.

    Args:
        context: What is scored.
    """
    config, run, pool = context.config, context.run, context.pool
    if config.checkpoints:
        return stops(config, run.folder), 0
    folder = run.path("warmup")
    recipe = config.warmup
    manifest = folder / "rows.json"
    with run.stage("warm-up"):
        if workers.helps():
            following.reached("warm-up")
            return stops(config, run.folder), 0
        rows = warm_up_rows(context)
        if not manifest.is_file():
            files.make_folder(folder)
            files.write_json(manifest, {"keys": [pool.keys[i] for i in rows]})
        steps = fit.planned_steps(len(rows), recipe)
        tokens = int(pool.scan.tokens[rows].sum()) * recipe.epochs
        planned = fit.planned_checkpoints(len(rows), recipe)
        if len(checkpoint_files.checkpoints(folder, planned)) < len(planned):
            loaded = context.model()
            wrapped = add_lora(loaded.model, config.lora, seed=derive_seed(config.seed, "lora"))
            with progress(f"warm-up on {len(rows)} rows", steps, "steps") as bar:
                fit.fit(
                    wrapped,
                    pool.item,
                    rows,
                    recipe,
                    folder,
                    seed=derive_seed(config.seed, "warm-up"),
                    save="epoch",
                    bar=bar,
                    name_of=pool.pool.where,
                )
            unload(wrapped)
    following.reached("warm-up")
    return stops(config, run.folder), tokens


def _steps(config: SelectConfig, there: list[int]) -> list[int]:
    """Return the steps, among those `there`, whose checkpoints count."""
    which = config.features.checkpoints or known(config.method).checkpoints
    if isinstance(which, str):
        return there[-1:] if which == "last" else there
    if missing := [step for step in which if step not in there]:
        raise UsageError(
            f"features.checkpoints: there is no checkpoint at step {', '.join(map(str, missing))}; there are those at "
            f"{', '.join(map(str, there))}"
        )
    return [step for step in there if step in which]


def warm_up_to_come(context: Context) -> tuple[tuple[int, int], int, list[int]]:
    """Return what the warm-up will take.

    Args:
        context: What is scored.

    Returns:
        The tokens of the warm-up, total and left; its number of rows, 0 without a warm-up; and the steps of the
        checkpoints at which gradients are computed.
    """
    config, pool = context.config, context.pool
    if config.checkpoints:
        return (0, 0), 0, _steps(config, [c.step for c in checkpoints.find(config.checkpoints)])
    recipe, rows = config.warmup, warm_up_rows(context)
    steps = fit.planned_checkpoints(len(rows), recipe)
    there = [
        step
        for step in steps
        if (context.run.path("warmup") / f"checkpoint-{step}" / checkpoint_files.COMPLETE).is_file()
    ]
    tokens = int(pool.scan.tokens[rows].sum()) * recipe.epochs
    left = tokens - tokens * max(there, default=0) // steps[-1]
    return (tokens, left), len(rows), _steps(config, steps[-recipe.checkpoints :] if recipe.checkpoints else steps)


def stops(config: SelectConfig, folder: Path) -> list[checkpoints.Checkpoint]:
    """Return the checkpoints that count in the scores of a run; their weights add up to 1.

    Args:
        config: The settings of the run.
        folder: The folder of the run.

    Raises:
        UsageError: There is none, or none at a step of `features.checkpoints`.
        DataError: One of them is damaged, or does not record its learning rates.
    """
    found = checkpoints.find(config.checkpoints or [folder / "warmup"])
    kept = found if config.checkpoints or not config.warmup.checkpoints else found[-config.warmup.checkpoints :]
    steps = _steps(config, [c.step for c in kept])
    if steps == [c.step for c in found]:
        return found
    kept = [c for c in kept if c.step in steps]
    total = sum(c.mean_lr for c in kept)
    return [replace(c, weight=c.mean_lr / total) for c in kept]
