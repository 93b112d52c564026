"""`datatools audit`: is the selection better than simple baselines, with the same recipe, seeds and number of rows?"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from datatools import SELECTORS, DataError, Selection, UsageError, files, select
from datatools.files import sealed
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.models.base import unload
from pipelines.report import select_page
from pipelines.rows import leakage, preflight
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs import run_files, verdicts
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say
from pipelines.runs.seeds import derive_seed
from pipelines.runs.workers import alone
from pipelines.select.scored import Context, candidates
from pipelines.select.scorer import scorer
from pipelines.select.verdict import BASE, SELECTED, print_table, summarise
from pipelines.settings.audit import AuditConfig
from pipelines.settings.methods import FULL, SCORERS, known
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.select import FeaturesConfig, SelectConfig
from pipelines.training import cost, evaluation, optimizers
from pipelines.training.checkpoint_files import is_complete
from pipelines.training.train import train_adapter


def run(config: AuditConfig) -> Path:
    """Write `audit.json` to `out` and into the selection's own report, and print the table.

    Every arm has the same number of rows and the same recipe, except `full`, which is one epoch over the whole pool. A
    seed determines the initial adapters and the order of the rows, and, for random arms, the rows themselves. Finished
    arms are kept, so an interrupted audit continues.

    Args:
        config: The settings.

    Returns:
        The folder of the audit.

    Raises:
        UsageError: Settings contradict each other, or a file does not exist.
        DataError: Rows cannot be used, or test rows were trained on or selected for.
        EnvironmentProblem: The machine cannot do it.
    """
    preflight.contradictions(config)
    alone("datatools audit")
    if (config.selected.parent / "run.yaml").is_file():
        run_files.refuse_special(config.selected.parent)
    optimizers.check(config.training)
    with in_scratch(config) as kept, Run(kept.out, kept, "audit", overwrite=kept.overwrite) as current:
        with current.stage("read"):
            loaded = models.load(config.model)
            inputs = Inputs(current, config.model, loaded)
            pool = inputs.read("pool", config.pool)
            test = inputs.read("test", config.test)
            target = inputs.read_like("target", config.pool, config.target, config.target_columns, recorded=False)
        if text := run_files.note(config.selected.parent):
            say(text)
        chosen, judged = _rows_of(config.selected, pool)
        leaks = _leaks(config, test, pool, target, chosen)
        inputs.record(by_content=("pool", "test", "selection"), encoding=False, selection=judged)
        contexts = {
            arm: Context(_as_select(config, arm), current, pool, target, lambda: loaded) for arm in _methods(config)
        }
        if config.dry_run:
            _estimate(config, loaded, pool, target, test, _planned(contexts, pool, config, chosen)).announce()
            say("dry run: data and model load; nothing was scored or trained")
            return config.out
        with current.stage("baselines"):
            plan = [
                (arm, seed, rows)
                for arm in (SELECTED, *config.against)
                for seed, rows in _arm(contexts.get(arm), pool, config, arm, chosen)
            ]
        estimate = _estimate(config, loaded, pool, target, test, plan, scored=True)
        estimate.announce()
        estimate.expect()
        results: list[dict[str, Any]] = []
        with current.stage("train and evaluate"):
            base = evaluation.losses(loaded.model, test, token_budget=2048, label=f"losses, {BASE}")
            for place, (arm, seed, rows) in enumerate(plan, start=1):
                label = _label(place, len(plan), arm, seed)
                results.append(
                    {"arm": arm, "seed": seed} | _train_and_measure(config, loaded, pool, test, rows, arm, seed, label)
                )
        audit = summarise(base, results, config) | _told(leaks) | {"selection": judged}
        files.write_json(current.path("audit.json"), audit)
        if verdicts.deliver(config.selected.parent, audit):
            say(f"report: {select_page.render(config.selected.parent)}")
    print_table(audit, Console())
    return config.out


def _leaks(config: AuditConfig, test: Rows, pool: Rows, target: Rows | None, chosen: list[int]) -> list[dict[str, Any]]:
    """Return where test rows were seen before.

    Raises:
        DataError: They were, and that is not allowed.
    """
    others: dict[str, tuple[Rows, list[int] | None]] = {"selection": (pool, chosen), "pool": (pool, None)}
    if target is not None:
        others["target"] = (target, None)
    near = config.pool.near_threshold if config.pool.dedup == "near" else None
    found = leakage.find(test, others, near=near)
    if found and not config.allow_overlap:
        raise DataError(
            f"audit: {leakage.sentence(found)}; losses on rows that were trained on or selected for prove nothing. "
            "Take them out of --test, or audit all the same with --allow-overlap: the report will say so"
        )
    return found


def _told(leaks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"overlap": leaks, "leaked": leakage.sentence(leaks)} if leaks else {}


def _methods(config: AuditConfig) -> list[str]:
    """Return the arms that are methods."""
    return [arm for arm in config.against if arm != FULL]


def _as_select(config: AuditConfig, arm: str) -> SelectConfig:
    """Return the settings that the scorer of an arm reads."""
    return SelectConfig(
        features=FeaturesConfig(folder=config.features),
        model=config.model,
        train=config.pool,
        target=config.target,
        out=config.out,
        seed=config.seed,
        method=arm,
    )


def _rows_of(selected: Path, pool: Rows) -> tuple[list[int], str]:
    """Return the pool rows whose lines are in `selected`, in that order, and the digest of the bytes of that file."""
    places: dict[str, list[int]] = {}
    for i in np.flatnonzero(pool.usable).tolist():
        places.setdefault(files.digest(pool.pool.raw(i)), []).append(i)
    if not selected.is_file():
        raise UsageError(f"--selected {selected}: no such file; give the selected.jsonl of a run")
    found = []
    content = files.read_bytes(selected)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        rows = places.get(files.digest(line))
        if not rows:
            raise DataError(
                f"{selected}:{number} is not a row of the pool; give --pool the files that it was selected from"
            )
        found.append(rows.pop(0))
    if not found:
        raise DataError(f"{selected}: holds no row that can be trained on")
    return found, files.digest(content)


def _draws(arm: str) -> bool:
    """Return whether every seed of the arm draws other rows, because the selector of its method uses no scores."""
    return arm != FULL and not SELECTORS[known(arm).selector].scores


def _is_scored(arm: str) -> bool:
    return arm not in (SELECTED, FULL) and not _draws(arm)


def _arm(
    context: Context | None, pool: Rows, config: AuditConfig, arm: str, chosen: list[int]
) -> list[tuple[int, list[int]]]:
    """Return (seed, rows) of each training run of an arm."""
    seeds = range(config.seed, config.seed + config.seeds)
    if arm == SELECTED:
        return [(seed, chosen) for seed in seeds]
    if arm == FULL:
        return [(config.seed, np.flatnonzero(pool.usable).tolist())]
    reference = Selection(torch.tensor(chosen))
    budget, selector = str(len(chosen)), known(arm).selector
    if _draws(arm):
        drawn = [
            select(selector, candidates(pool), budget, seed=derive_seed(seed, "audit", arm), reference=reference)
            for seed in seeds
        ]
        return [(seed, found.indices.tolist()) for seed, found in zip(seeds, drawn, strict=True)]
    assert context is not None
    best = select(selector, candidates(pool, scorer(arm).score(context)), budget).indices.tolist()
    return [(seed, best) for seed in seeds]


def _train_and_measure(
    config: AuditConfig,
    loaded: models.LoadedModel,
    pool: Rows,
    test: Rows,
    rows: list[int],
    arm: str,
    seed: int,
    label: str,
) -> dict[str, Any]:
    """Return the held-out loss after training on `rows`; results are kept under a hash of what determines them."""
    assert config.lora is not None
    recipe = config.training if arm != FULL else one_pass(config.training)
    folder, measured = _kept(config, loaded, pool, test, rows, recipe, seed)
    if measured.is_file():
        with suppress(sealed.Damaged):  # or written by a version without seals: measure again
            return sealed.read_json(measured)
    train_adapter(loaded, pool, rows, recipe, config.lora, folder / "adapter", seed=seed, label=label)
    module = load_adapter(loaded.model, folder / "adapter")
    try:
        found = evaluation.losses(module, test, token_budget=2048, label=f"losses, {label}")
    finally:
        unload(module)
    trained = int(pool.scan.tokens[rows].sum()) * recipe.epochs
    result = {"loss": found["loss"], "tokens": found["tokens"], "rows": len(rows), "trained_tokens": trained}
    sealed.write_json(measured, result)
    return result


def _kept(
    config: AuditConfig,
    loaded: models.LoadedModel,
    pool: Rows,
    test: Rows,
    rows: list[int],
    recipe: TrainingConfig,
    seed: int,
) -> tuple[Path, Path]:
    """Return the folder of an arm's adapter and the file of its losses, named after everything that determines them."""
    assert config.lora is not None
    made_of = {
        "model": dict(loaded.digests),
        "lora": config.lora.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "rows": [pool.keys[i] for i in rows],
    }
    folder = (config.arms or config.out / "arms") / files.digest(files.json_bytes(made_of))[:16]
    tested = [test.keys[i] for i in np.flatnonzero(test.usable).tolist()]  # content, not files: other templates differ
    return folder, folder / f"losses-{files.digest(files.json_bytes(tested))[:16]}.json"


def _label(place: int, runs: int, arm: str, seed: int) -> str:
    return f"{place} of {runs}: {arm}, seed {seed}"


def _planned(
    contexts: dict[str, Context], pool: Rows, config: AuditConfig, chosen: list[int]
) -> list[tuple[str, int, list[int]]]:
    """Return (arm, seed, rows) without computing scores: for a scored arm, other rows of the same number stand in."""
    plan = []
    for arm in (SELECTED, *config.against):
        if _is_scored(arm):
            plan += [(arm, seed, chosen) for seed in range(config.seed, config.seed + config.seeds)]
        else:
            plan += [(arm, seed, rows) for seed, rows in _arm(contexts.get(arm), pool, config, arm, chosen)]
    return plan


def _estimate(
    config: AuditConfig,
    loaded: models.LoadedModel,
    pool: Rows,
    target: Rows | None,
    test: Rows,
    plan: list[tuple[str, int, list[int]]],
    scored: bool = False,
) -> cost.Estimate:
    """Return the cost of what is missing: training runs, losses, and scores unless they are `scored`."""
    with cost.as_trained(loaded.model, config.lora) as module:
        found = cost.probe(module, int(np.median(pool.scan.tokens[pool.usable])))
        rule = cost.recipe_of(config.training, module)
    tested = test.tokens()
    losses = found.seconds(tested, max(1, tested // 2048), gradient=False)
    parts, tokens, done = {f"losses, {BASE}": losses}, tested, 0
    part_of = {"pool": pool.tokens(), "target": target.tokens() if target is not None else 0}
    for arm in () if scored else [arm for arm in SCORERS if arm in _methods(config)]:
        if whole := sum(part_of[rows] for rows in known(arm).forward):
            parts[f"scores of {arm}"] = found.seconds(whole, max(1, whole // 1024), gradient=False)
            tokens += whole
    for place, (arm, seed, rows) in enumerate(plan, start=1):
        recipe = config.training if arm != FULL else one_pass(config.training)
        label = _label(place, len(plan), arm, seed)
        folder, measured = _kept(config, loaded, pool, test, rows, recipe, seed)
        if measured.is_file() and (scored or not _is_scored(arm)):
            done += 1
            continue
        lengths = pool.scan.tokens[rows].tolist()
        if not is_complete(folder / "adapter"):
            parts[label] = cost.training(found, rule, recipe, lengths)
            tokens += sum(lengths) * recipe.epochs
        parts[f"losses, {label}"] = losses
        tokens += tested
    return cost.Estimate(
        parts=parts,
        tokens=tokens,
        memory=cost.memory(found, rule.state, config.training.micro_tokens),
        disk=(len(plan) - done) * (found.trainable * found.width + cost.ADAPTER_BYTES),
        done=f"{done} of {len(plan)} training runs are done" if done else "",
        based_on=f"{len(plan)} training runs; {found.text()}",
    )


def one_pass(recipe: TrainingConfig) -> TrainingConfig:
    """Return the recipe of the arm `full`: one epoch, however many the other arms have; the table says so.

    Args:
        recipe: The recipe of the other arms.
    """
    return recipe.model_copy(update={"epochs": 1})
