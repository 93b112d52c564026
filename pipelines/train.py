"""`datatools train`: a model, rows, and any optimizer of the suite -> an adapter (or a whole model)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from datatools import DataError, Order, UsageError, files
from optim.distributed import world
from pipelines import coreset_report, coresets, models, order_recipe, trainer
from pipelines.config import LoraConfig, RunSettings, TrainConfig, TrainingConfig
from pipelines.prepare import Rows, file_facts, prepare
from pipelines.runs import Run, derive_seed, progress, rank, say
from pipelines.trainer import Trained

S = TypeVar("S", bound=RunSettings)


def run(config: TrainConfig) -> Path:
    """Train, and write `adapter/` (or `model/`), `metrics.jsonl` and checkpoints to `out`; a killed run goes on.

    Under `torchrun` the processes share the work of each step (`DataTrainer`), and the first of them writes.
    Raises: UsageError, DataError, EnvironmentProblem, each with what to do.
    """
    with world() as here:
        if here.device.type == "cuda":
            torch.cuda.set_device(here.device)
        return _run(config)


def _run(config: TrainConfig) -> Path:
    if config.model.adapter is not None and config.lora is not None:
        raise UsageError(
            f"model.adapter {config.model.adapter}: fresh adapters would be trained on top of it and saved without it; "
            "merge it into its model first, or train all weights (--lora-rank 0)"
        )
    given = recipe_of_order = None
    if config.order is not None:
        given, recipe_of_order = order_recipe.read(config.order)
        config = order_recipe.adopt(config, recipe_of_order)
    trainer.check(config.training)
    with in_scratch(config) as kept, Run(kept.out, kept, "train", overwrite=kept.overwrite) as current:
        with current.stage("read"), trainer.lead_first():
            tokenizer = models.load(config.model, tokenizer_only=True)
            rows = prepare(
                config.data,
                config.model,
                tokenizer.tokenizer,
                cache=current.path("inputs"),
                label="data",
                folder=current.folder,
                limits=tokenizer.limits,
            )
            facts: dict[str, Any] = {
                "model": dict(tokenizer.digests),
                "encoding": rows.encoder.fingerprint(),
                "data": file_facts(rows),
            }
            current.check(facts)  # before others look: what an accepted change makes outdated is moved away here
        chosen = np.flatnonzero(rows.usable).tolist()
        recipe, choose = config.training, config.coreset
        sequence: list[list[int]] | None = None
        if choose is not None:
            recipe, choose = coresets.resolve(recipe, choose, len(chosen))
            coresets.require_sources(choose, rows, chosen, key=config.data.source_key)
        steps = trainer.planned_steps(len(chosen), recipe)
        held = 0
        if given is not None and config.order is not None:
            if choose is not None:
                raise UsageError("training in an order (--order) and choosing rows of each batch (coreset) exclude "
                                 "each other; give one")
            sequence = rows_of(given, rows, str(config.order))
            if recipe_of_order is not None:
                order_recipe.check(config.order, recipe_of_order, rows, tokenizer.digests)
                order_recipe.announce(config.order, recipe_of_order)
                if (warm_up := order_recipe.warm_up_of(recipe_of_order)) is not None:
                    held = len(warm_up)
                    sequence = rows_of(warm_up, rows, str(config.order)) + sequence
            steps = len(sequence)
        tokens = rows.tokens() * config.training.epochs
        if sequence is None:
            epochs = f"{tokens:,} tokens in {recipe.epochs} epochs, "
            if steps == recipe.max_steps:
                epochs = ""  # it stops before they are over
            say(f"{len(chosen):,} rows, {epochs}{steps:,} optimizer steps of {recipe.batch_size:,} rows")
        else:
            say(f"{steps:,} optimizer steps, in the order of {config.order}")
        if choose is not None:
            say(f"coreset: {choose.keep:,} rows kept of {choose.large_batch:,} a step, by {choose.method}")
        if config.dry_run:
            models.load(config.model)
            say("dry run: data and model load; nothing was trained")
            return config.out
        done = current.path("adapter" if config.lora is not None else "model")
        beside = ("metrics.jsonl",) if choose is None else ("metrics.jsonl", "coreset.json")
        # a damaged one was set aside when the run was opened: the last checkpoint knows what is in it
        if trainer.is_complete(done) and all(current.path(name).is_file() for name in beside):
            say(f"already trained: {done}")
            return config.out
        # all weights train, from float32 ones that are computed with in bfloat16
        master = config.training.rounding == "master" and models.dtype_of(config.model) == torch.bfloat16
        master = master and config.lora is None  # adapters are in float32 as they are
        with current.stage("load model"):
            loaded = models.load(config.model.model_copy(update={"dtype": "float32"}) if master else config.model)
        sources = rows.pool.sources
        if choose is not None and choose.clusters is not None:
            with current.stage("cluster rows"):
                sources = coresets.clusters_of(loaded.model, rows, chosen, choose.clusters, seed=config.seed)
        with current.stage("train"), progress("training", steps, "steps") as bar:
            module = trainable(loaded.model, config.lora, seed=config.seed)
            if recipe_of_order is not None and config.order is not None:
                order_recipe.check_optimizer(config.order, recipe_of_order, trainer.optimizer_of(recipe, module))
            result = trainer.fit(
                module,
                rows.item,
                chosen,
                recipe,
                current.path("checkpoints"),
                seed=derive_seed(config.seed, "training"),
                save=config.save_steps or "epoch",
                advance=bar.advance,
                choose=choose,
                source_of=sources.__getitem__,
                name_of=rows.pool.where,
                steps=sequence,
                held=held,
                autocast=master,
            )
        if choose is not None and rank() == 0:
            facts_of_choice = coresets.facts(choose, [sources[row] for row in chosen], result.monitored)
            files.write_json(current.path("coreset.json"), facts_of_choice)
        if rank() == 0:
            _save(module, rows, result, done, current)
        say(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}; saved {done}")
    return config.out


def rows_of(order: Order, rows: Rows, name: str) -> list[list[int]]:
    """The rows of each step of an order. Raises: DataError for an id that is not among the usable rows."""
    index = {rows.pool.ids[row]: row for row in np.flatnonzero(rows.usable).tolist()}
    missing = [identity for batch in order.batches for identity in batch if identity not in index]
    if missing:
        raise DataError(
            f"order {name}: row {missing[0]!r} (and {len(missing) - 1} more) is not among the usable rows of the data; "
            "train on the data that the order was made for"
        )
    return [[index[identity] for identity in order[step]] for step in range(len(order))]


@contextmanager
def in_scratch(config: S) -> Iterator[S]:
    """`config`, and for a dry run one whose `out` is a folder that is thrown away: it must leave nothing behind."""
    if not config.dry_run:
        yield config
        return
    with files.scratch_folder() as scratch:
        # not in the scratch folder itself: that one is locked while it is in use, and a run locks the folder above it
        yield config.model_copy(update={"out": scratch / "dry" / "run", "overwrite": False})


def trainable(model: Any, lora: LoraConfig | None, *, seed: int) -> Any:
    """The module whose parameters train: `model` with fresh adapters, or all of `model`."""
    if lora is not None:
        return models.add_lora(model, lora, seed=derive_seed(seed, "lora"))
    return model.requires_grad_(True)


def _save(module: Any, rows: Rows, result: Trained, done: Path, current: Run) -> None:
    lines = [
        f'{{"step": {step}, "loss": {value:.6f}, "learning_rate": {rate:.8g}}}'
        for step, (value, rate) in enumerate(zip(result.losses, result.learning_rates, strict=True), start=1)
    ]
    for step, seen in result.monitored.items():
        lines[step - 1] = f"{lines[step - 1][:-1]}, {json.dumps(seen, sort_keys=True)[1:]}"
    files.write_text(current.path("metrics.jsonl"), "\n".join(lines) + "\n")
    if current.path("coreset.json").is_file():
        say(f"{coreset_report.in_short(current.folder)}; report: {coreset_report.render(current.folder)}")
    if result.directions:  # enough to replay the run: optim.zeroth_order
        steps = (json.dumps(entry, sort_keys=True) + "\n" for entry in result.directions)
        files.write_text(current.path("zeroth_order.jsonl"), "".join(steps))
    # last: a run that is killed before it goes on from its newest checkpoint
    _keep(done, module, rows.encoder.trained_tokenizer())


def _keep(folder: Path, *parts: Any) -> None:
    """Save each part (`save_pretrained`) in `folder`, and mark it complete."""
    files.make_folder(folder)
    with trainer.saving(folder):
        for part in parts:
            part.save_pretrained(folder)
    trainer.mark_complete(folder)


def train_adapter(
    loaded: models.LoadedModel,
    rows: Rows,
    chosen: Sequence[int],
    recipe: TrainingConfig,
    lora: LoraConfig,
    folder: Path,
    *,
    seed: int,
    label: str,
) -> None:
    """Train fresh adapters on `chosen` rows and save them in `folder`; does nothing where that is already done."""
    if trainer.is_complete(folder):
        return
    steps = trainer.planned_steps(len(chosen), recipe)
    module = trainable(loaded.model, lora, seed=seed)
    try:
        with progress(label, steps, "steps") as bar:
            result = trainer.fit(
                module, rows.item, list(chosen), recipe, folder, seed=derive_seed(seed, "training"), advance=bar.advance
            )
        _keep(folder, module)
    finally:
        models.unload(module)
    fell = f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}"
    say(f"{label}: {fell} ({result.steps} steps, {result.tokens:,} tokens)")
