"""`datatools train`: trains a model on rows with any optimizer of the suite, and saves an adapter or a whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datatools import CORESET_FEATURES, DataError, Order, files
from optim.distributed import world
from pipelines.colm import coresets, stored
from pipelines.colm.choosing import check as check_coreset
from pipelines.colm.featuring import check_target
from pipelines.colm.sources import clusters_of, require_sources
from pipelines.models import load as models
from pipelines.models import quantized
from pipelines.models.base import unload
from pipelines.models.lora import add_lora
from pipelines.report import training_page as training_report
from pipelines.report.drawing import draw_last
from pipelines.rows import leakage, preflight
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs import devices
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say, warn
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.runs.workers import rank
from pipelines.settings import redaction, trackers
from pipelines.settings.parts import LoraConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import checkpoint_files, cost, fit, optimizers, order_recipe, summary, token_selection
from pipelines.training import held_out as held_out_rows
from pipelines.training.validation import PREFIX, planned


def run(config: TrainConfig) -> Path:
    """Train, and write `adapter/` (or `model/`), `metrics.jsonl` and checkpoints to `out`; a killed run is continued.

    Under `torchrun`, the processes share the work of each step (`DataTrainer`), and the first of them writes.

    Args:
        config: The settings.

    Returns:
        The folder of the run.

    Raises:
        UsageError: A setting is wrong.
        DataError: A row, a model or a checkpoint cannot be used.
        EnvironmentProblem: A file cannot be read or written, or a package is missing.
    """
    preflight.contradictions(config)  # before anything looks for GPUs
    with world() as here:
        if here.device.type == "cuda":
            torch.cuda.set_device(here.device)
        return _run(config)


def _run(config: TrainConfig) -> Path:
    given = recipe_of_order = None
    if config.order is not None:
        given, recipe_of_order = order_recipe.read(config.order)
        config = order_recipe.adopt(config, recipe_of_order)
    optimizers.check(config.training)
    if config.coreset is not None:
        check_coreset(config.coreset)
    trackers.check(config)
    with in_scratch(config) as kept, Run(kept.out, kept, "train", overwrite=kept.overwrite) as current:
        with current.stage("read"), checkpoint_files.lead_first():
            tokenizer = models.load(config.model, tokenizer_only=True)
            inputs = Inputs(current, config.model, tokenizer)
            rows = inputs.read("data", config.data, bad_rows=True)
            held_out = inputs.read_like("validation", config.data, config.eval_data, config.eval_columns)
            aims = None
            if config.coreset is not None:
                aims = inputs.read_like("coreset target", config.data, config.coreset.target, config.eval_columns)
                check_target(config.coreset, None if aims is None else int(aims.usable.sum()))
            more: dict[str, Any] = {}
            if config.tokens is not None:
                more["reference model"] = dict(
                    token_selection.check_reference(config.tokens, config.model, tokenizer.tokenizer)
                )
            inputs.record(**more)  # before other processes look, because outdated results are moved away here
        chosen = np.flatnonzero(rows.usable).tolist()
        recipe, choose = config.training, config.coreset
        sequence: list[list[int]] | None = None
        if choose is not None:
            recipe, choose = coresets.resolve(recipe, choose, len(chosen))
            require_sources(choose, rows, chosen, key=config.data.source_key)
        table = None
        if choose is not None and choose.store is not None:
            keys = {row: rows.keys[row] for row in chosen}
            table = stored.read(
                choose,
                keys,
                model=tokenizer.digests,
                where=rows.pool.where,
                seed=derive_seed(config.seed, "coreset"),
                encoding=rows.encoder.fingerprint(),
            )
        steps = fit.planned_steps(len(chosen), recipe)
        held = 0
        if given is not None and config.order is not None:
            sequence = rows_of(given, rows, str(config.order))
            if recipe_of_order is not None:
                order_recipe.check(config.order, recipe_of_order, rows, tokenizer.digests)
                order_recipe.announce(config.order, recipe_of_order)
                if (warm_up := order_recipe.warm_up_of(recipe_of_order)) is not None:
                    held = len(warm_up)
                    sequence = rows_of(warm_up, rows, str(config.order)) + sequence
            steps = len(sequence)
        leaked = None if held_out is None else _leaked(config, held_out, rows)
        plan = held_out_rows.plan_of(config, held_out, tokenizer)
        every = config.eval_every
        if every is None:
            every = steps if sequence is not None else math.ceil(len(chosen) / recipe.batch_size)
        tokens = rows.tokens() * config.training.epochs
        if sequence is None:
            epochs = f"{tokens:,} tokens in {recipe.epochs} epochs, "
            if steps == recipe.max_steps:
                epochs = ""  # the run stops before they end
            say(f"{len(chosen):,} rows, {epochs}{steps:,} optimizer steps of {recipe.batch_size:,} rows")
        else:
            say(f"{steps:,} optimizer steps, in the order of {config.order}")
        if choose is not None:
            say(f"coreset: {choose.keep:,} rows kept of {choose.large_batch:,} per step, by {choose.method}")
        if held_out is not None:
            times = planned(steps, every)
            say(f"validation: {int(held_out.usable.sum()):,} rows, {held_out.tokens():,} tokens, {times:,} times")
        if config.tokens is not None:
            say(f"tokens: {config.tokens.share:.0%} of each row, by their excess over {config.tokens.reference}")
        if config.dry_run:
            lengths = rows.scan.tokens[chosen if sequence is None else [row for step in sequence for row in step]]
            saves = -(-steps // config.save_steps) if config.save_steps else recipe.epochs
            times = 0 if held_out is None else planned(steps, every)
            once = [] if held_out is None else [(held_out.tokens(), held_out.tokens() / recipe.micro_tokens)]
            measured = 1 + (times if config.metrics is not None and config.metrics.during else 0)
            checked = once * times + held_out_rows.work(plan) * measured
            _estimate(config, tokenizer, recipe, lengths.tolist(), steps, saves, checked).announce()
            say("dry run: data and model load; nothing was trained")
            return config.out
        done = current.path("adapter" if config.lora is not None else "model")
        beside = ("metrics.jsonl",) if choose is None else ("metrics.jsonl", "coreset.json")
        # a damaged result was set aside when the run was opened; the last checkpoint contains it
        if checkpoint_files.is_sound(done) and all(current.path(name).is_file() for name in beside):
            say(f"already trained: {done}")
            draw_last(lambda: training_report.render_any(current.folder), saved=done)
            return config.out
        # all weights train; they are float32, and the computation is in bfloat16
        master = config.training.rounding == "master" and devices.dtype_of(config.model) == torch.bfloat16
        master = master and config.lora is None  # adapters are always in float32
        with current.stage("load model"):
            kept_in = config.model.model_copy(update={"dtype": "float32"}) if master else config.model
            loaded = models.load(kept_in, tokenizer=tokenizer)
        sources: Sequence[str] = rows.pool.sources
        if choose is not None and choose.clusters is not None:
            with current.stage("cluster rows"):
                sources = clusters_of(loaded.model, rows, chosen, choose.clusters, seed=config.seed)
        tokens_to_keep = None
        if config.tokens is not None:
            with current.stage("reference losses"):
                tokens_to_keep = token_selection.measured(config.tokens, config.model, rows, chosen)
        with current.stage("train"), progress("training", steps, "steps") as bar:
            module = trainable(loaded.model, config.lora, seed=config.seed)
            if recipe_of_order is not None and config.order is not None:
                made = optimizers.optimizer_of(recipe, module)
                order_recipe.check_optimizer(config.order, recipe_of_order, made)
            result = fit.fit(
                module,
                rows.item,
                chosen,
                recipe,
                current.path("checkpoints"),
                seed=derive_seed(config.seed, "training"),
                save=config.save_steps or "epoch",
                bar=bar,
                choose=None if choose is None else coresets.Coresets(choose, sources.__getitem__, table, _items(aims)),
                tokens=tokens_to_keep,
                name_of=rows.pool.where,
                steps=sequence,
                held=held,
                autocast=master,
                validation=held_out_rows.validation(
                    config, held_out, plan, every=every, step=rows.tokens() * recipe.batch_size / len(chosen)
                ),
                report_to=config.report_to,
            )
        if rank() == 0:
            final = held_out_rows.at_the_end(module, plan) if plan is not None else {}
            if choose is not None:
                facts_of_choice = coresets.facts(
                    choose, [sources[row] for row in chosen], coresets.monitored(result.entries)
                ) | ({"validation_metrics": final} if final else {})
                files.write_json(current.path("coreset.json"), redaction.hide_all(facts_of_choice))
            story = summary.facts(
                config, result, rows=len(chosen), steps=steps, held_out=held_out, leaked=leaked, final=final
            )
            files.write_json(current.path(training_report.FACTS), redaction.hide_all(story))
            _save(module, rows, summary.with_final(result, final), done, current)
        say(f"{result.fell}; saved {done}")
        if result.best is not None:
            say(summary.best_in_words(result, config))
        if rank() == 0:  # last, so that a failure loses no results
            draw_last(lambda: training_report.render_any(current.folder), saved=done)
    return config.out


def _items(rows: Rows | None) -> list[tuple[list[int], list[int]]]:
    return [] if rows is None else [rows.item(row) for row in np.flatnonzero(rows.usable).tolist()]


def _leaked(config: TrainConfig, held_out: Rows, rows: Rows) -> str | None:
    """Return and print which validation rows are also trained on: their loss shows memorisation."""
    near = config.data.near_threshold if config.data.dedup == "near" else None
    found = leakage.find(held_out, {"training data": (rows, None)}, near=near)
    if not found:
        return None
    sentence = leakage.sentence(found, "validation rows")
    if rank() == 0:
        warn(f"{sentence}: their loss will be too low")
    return sentence


def _estimate(
    config: TrainConfig,
    tokenizer: models.LoadedModel,
    recipe: TrainingConfig,
    lengths: list[int],
    steps: int,
    saves: int,
    checked: Sequence[tuple[int, float]],
) -> cost.Estimate:
    """Return the expected cost of the run, timed on synthetic tokens; `checked`: tokens and passes of validations."""
    model = models.load(config.model, tokenizer=tokenizer).model
    with cost.as_trained(model, config.lora) as module:
        found = cost.probe(module, int(np.median(lengths)))
        rule = cost.recipe_of(config.training, module)
    choose = config.coreset
    keep = 1.0
    if choose is not None:
        least, large = choose.sizes(config.training.batch_size)[0], recipe.batch_size
        keep = sum(choose.kept_at(t, steps, keep=least, large=large) for t in range(steps)) / (max(1, steps) * large)
    trained = [keep * length for length in lengths]
    seconds = cost.training(found, rule, recipe, trained, saves)
    tokens = sum(lengths) * (recipe.epochs if config.order is None else 1)
    if config.order is not None:
        once = recipe.model_copy(update={"epochs": 1, "max_steps": None, "batch_size": -(-len(lengths) // steps)})
        seconds = cost.training(found, rule, once, lengths, saves)
    elif recipe.max_steps is not None:
        whole = fit.planned_steps(len(lengths), recipe.model_copy(update={"max_steps": None}))
        tokens = tokens * steps // max(1, whole)
    if choose is not None and not CORESET_FEATURES[choose.features].free:  # all rows go forward, kept rows train
        seconds += found.seconds(tokens, steps, gradient=CORESET_FEATURES[choose.features].as_training)
    validation = sum(found.seconds(many, max(1.0, passes), gradient=False) for many, passes in checked)
    one = found.trainable * found.width
    return cost.Estimate(
        parts={"training": seconds + validation},
        tokens=tokens + sum(many for many, _ in checked),
        memory=cost.memory(found, rule.state, recipe.micro_tokens),
        disk=saves * (one + rule.state + cost.CHECKPOINT_BYTES) + one + cost.ADAPTER_BYTES,
        based_on=found.text(),
    )


def rows_of(order: Order, rows: Rows, name: str) -> list[list[int]]:
    """Return the rows of each step of an order.

    Args:
        order: The order.
        rows: The rows.
        name: The name of the order, for messages.

    Raises:
        DataError: An id is not among the usable rows.
    """
    index = {rows.pool.ids[row]: row for row in np.flatnonzero(rows.usable).tolist()}
    missing = [identity for batch in order.batches for identity in batch if identity not in index]
    if missing:
        raise DataError(
            f"order {name}: row {missing[0]!r} (and {len(missing) - 1} more) is not among the usable rows of the data; "
            "train on the data for which the order was made"
        )
    return [[index[identity] for identity in order[step]] for step in range(len(order))]


def trainable(model: Any, lora: LoraConfig | None, *, seed: int) -> Any:
    """Return the module whose parameters train: the model with new adapters, or the whole model.

    Args:
        model: The model.
        lora: The adapters; None trains all weights.
        seed: The seed of the run.
    """
    if lora is not None:
        return add_lora(model, lora, seed=derive_seed(seed, "lora"))
    quantized.refuse_training(model)
    return model.requires_grad_(True)


def _save(module: Any, rows: Rows, result: fit.Trained, done: Path, current: Run) -> None:
    files.write_text(current.path("metrics.jsonl"), "".join(map(_line, result.entries)))
    if result.directions:  # enough to replay the run: optim.zeroth_order
        steps = (json.dumps(entry, sort_keys=True) + "\n" for entry in result.directions)
        files.write_text(current.path("zeroth_order.jsonl"), "".join(steps))
    # last: a run that is killed before this continues from its newest checkpoint
    _keep(done, module, rows.encoder.trained_tokenizer())


def _line(entry: Mapping[str, Any]) -> str:
    digits = {"loss": ".6f", "learning_rate": ".8g", "grad_norm": ".6g"}
    digits |= {key: ".6f" for key in entry if key.startswith(PREFIX)}
    shown = {
        key: float(format(value, digits[key])) if key in digits and value is not None else value
        for key, value in entry.items()
    }
    return json.dumps(shown) + "\n"


def _keep(folder: Path, *parts: Any) -> None:
    """Save each part (`save_pretrained`) in `folder`, and mark the folder complete."""
    files.remove_leftovers(files.make_folder(folder.parent))
    with checkpoint_files.saving(folder), files.atomic_folder(folder) as fresh:
        for part in parts:
            part.save_pretrained(fresh)
        checkpoint_files.mark_complete(fresh)


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
    """Train new adapters on some rows and save them; does nothing if that is already done.

    Args:
        loaded: The model.
        rows: The rows.
        chosen: The numbers of the rows to train on.
        recipe: The recipe.
        lora: The adapters.
        folder: The folder of the result.
        seed: The seed.
        label: The label of the progress.
    """
    if checkpoint_files.is_sound(folder):
        return
    steps = fit.planned_steps(len(chosen), recipe)
    module = trainable(loaded.model, lora, seed=seed)
    try:
        with progress(label, steps, "steps") as bar:
            result = fit.fit(
                module,
                rows.item,
                list(chosen),
                recipe,
                folder,
                seed=derive_seed(seed, "training"),
                bar=bar,
                name_of=rows.pool.where,
            )
        _keep(folder, module)
    finally:
        unload(module)
    say(f"{label}: {result.fell} ({result.steps} steps, {result.tokens:,} tokens)")
