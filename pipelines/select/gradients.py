"""Gradients of the pool and the target at the checkpoints, projected and kept.

The methods that compare an optimizer's update for a pool row with the gradient of a target row share this module; they
differ in how a gradient becomes a feature (`Recipe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from datatools import (
    ENCODINGS,
    DataError,
    GradientFeatures,
    Projector,
    extract,
    extract_preferences,
    files,
)
from optim import SGDRule, UpdateMap, UpdateRule
from pipelines.engines.units import taken
from pipelines.models.losses import answer_losses_for, losses_for
from pipelines.rows.rows import Rows
from pipelines.runs.memory import token_budget
from pipelines.runs.messages import library_warnings
from pipelines.runs.progress import progress
from pipelines.select import objectives, parameters
from pipelines.select.scored import Context, common_rows, unique_among
from pipelines.select.scorer import Work
from pipelines.select.stores import FEATURE_VERSION, filling, job_of, open_store, tokens_of
from pipelines.select.warm_up import stops, warm_up, warm_up_to_come
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoints


@dataclass(frozen=True)
class At:
    """A checkpoint of the model, for the choice of a projector.

    Attributes:
        context: What is scored.
        checkpoint: The checkpoint.
        module: The model at this checkpoint.
        names: The parameters whose gradients are used.
        plain: The map that returns their plain gradients.
        meta: What features at this checkpoint depend on, except the projector.
    """

    context: Context
    checkpoint: checkpoints.Checkpoint
    module: Any
    names: list[str]
    plain: UpdateMap
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How gradients become features.

    Attributes:
        projector: Makes the projection from gradients to features.
        prefix: The prefix of the names of the stores.
        plain: Whether pool rows are compared by their plain gradients instead of the optimizer's updates.
    """

    projector: Callable[[At], Projector]
    prefix: str = ""
    plain: bool = False


@dataclass(frozen=True)
class Features:
    """The filled stores of one checkpoint, and how they were made."""

    train: GradientFeatures
    target: GradientFeatures
    tokens: int
    rule: UpdateRule
    coverage: dict[str, Any]


def _features(
    context: Context,
    checkpoint: checkpoints.Checkpoint,
    pool_rows: Mapping[str, int],
    target_rows: Mapping[str, int],
    recipe: Recipe,
) -> Features:
    """Return the stores of the pool's updates and of the target's plain gradients at one checkpoint."""
    config, run = context.config, context.run
    loaded = context.model()
    with checkpoints.at(checkpoint, config.model, loaded.model) as module:
        state = checkpoints.updates(
            checkpoint,
            checkpoints.trainable(module),
            adam_mode=config.features.adam_mode,
            module=module,
            base=loaded.model,
        )
        params = {name: p for name, p in module.named_parameters() if name in state.params}
        names = parameters.covered_by(module, params, config.features)
        coverage = _coverage(params, names, config)
        if config.features.adam_mode == "code" and (text := checkpoints.epsilon_warning(state)):
            run.warnings.append(text)
        target_map = checkpoints.restrict(state, names, SGDRule())
        train_map = target_map if recipe.plain else checkpoints.restrict(state, names)
        rule = next(iter(train_map.rules.values()))
        common: dict[str, Any] = {
            "format": FEATURE_VERSION,
            "model": dict(loaded.digests),
            "checkpoint": checkpoint.digests(),
            "encoding": context.pool.encoder.fingerprint(),
            "parameters": files.digest(repr([(name, tuple(params[name].shape)) for name in names]).encode()),
            "method": config.features.method,
            "token_budget": config.features.token_budget,
            "precision": str(next(module.parameters()).dtype),
        }
        projector = recipe.projector(At(context, checkpoint, module, names, target_map, common))
        names_of = list(common)
        names_of.insert(names_of.index("parameters"), "projector")  # plans keep the order that they always had
        common["projector"] = projector.metadata()
        common = {name: common[name] for name in names_of}
        stores, tokens = [], 0
        of_target = objectives.folder(config, checkpoint.step)
        jobs = (
            (f"train-{checkpoint.step}", context.pool, pool_rows, train_map),
            (of_target, context.wanted, target_rows, target_map),
        )
        for name, rows, planned, updates in jobs:
            meta = {**common, "gradient": sorted({described(r) for r in updates.rules.values()})}
            folder = context.features_folder / f"{recipe.prefix}{name}"
            with filling(folder):
                store = open_store(
                    context,
                    folder,
                    planned,
                    among=rows.unique() if rows is context.pool else planned,
                    meta=meta,
                    dim=projector.dim,
                    dtype=config.features.dtype,
                    rows_per_unit=config.features.rows_per_unit,
                )
                tokens += sum(int(rows.scan.tokens[i]) for i in planned.values())
                if rows is context.wanted and config.objective == "dpo":
                    _fill_pairs(context, store, module, planned, updates, projector)
                else:
                    _fill(context, store, module, rows, planned, updates, projector)
            stores.append(store)
        return Features(stores[0], stores[1], tokens, rule, coverage)


def gradients(
    context: Context, chosen: list[int], recipe: Recipe
) -> tuple[list[checkpoints.Checkpoint], list[Features], int]:
    """Compute the features of pool rows at each checkpoint.

    Args:
        context: What is scored.
        chosen: Usable pool rows.
        recipe: How gradients become features.

    Returns:
        The checkpoints, the features at each, and the tokens of the warm-up.
    """
    run = context.run
    found, tokens = warm_up(context)
    run.provenance["checkpoints"] = [str(c.folder.name) for c in found]
    seen = [*chosen, *(common_rows(context.pool, context.config.seed) if context.config.common is not None else ())]
    pool_rows = unique_among(context.pool, seen)
    target_rows = objectives.unique(context.config, context.wanted)
    made: list[Features] = []
    for checkpoint in found:
        with run.stage(f"features at step {checkpoint.step}"):
            made.append(_features(context, checkpoint, pool_rows, target_rows, recipe))
    context.merge()
    return found, made, tokens


def _fill(
    context: Context,
    store: GradientFeatures,
    module: Any,
    rows: Rows,
    planned: Mapping[str, int],
    updates: UpdateMap,
    projector: Any,
) -> None:
    """Compute what is missing in the store: for the rows `planned`, and for an earlier shortlist."""
    first = rows.unique()
    missing = {key for unit in store.missing_units() for key in store.unit_keys(unit)}
    if not missing:
        return
    lengths = {key: int(rows.scan.tokens[first[key]]) for key in missing}
    todo = sum(lengths.values())
    total = todo + sum(int(rows.scan.tokens[i]) for key, i in planned.items() if key not in missing)
    label = f"gradients of the {'pool' if rows is context.pool else 'target'} at {store.folder.name}"
    budget = token_budget(context.config.features.token_budget, label)
    with (
        library_warnings(),
        progress(label, total, "tokens", done=total - todo) as bar,
    ):
        extract(
            store,
            module,
            losses_for(context.config.features.method),
            lambda keys: rows.batch([first[key] for key in keys], module.device),
            lengths,
            updates,
            projector,
            method=context.config.features.method,  # type: ignore[arg-type]
            token_budget=budget,
            name=lambda key: rows.pool.where(first[key]),
            advance=lambda n, tokens: bar.advance(tokens),
            units=taken(job_of(store, bar, lambda unit: sum(lengths[key] for key in store.unit_keys(unit)))),
        )


def _fill_pairs(
    context: Context,
    store: GradientFeatures,
    module: Any,
    first: Mapping[str, int],
    updates: UpdateMap,
    projector: Any,
) -> None:
    """Compute what is missing in the store of the target's pairs, for both answers of each pair."""
    if not store.missing_units():
        return
    config, chosen = context.config, context.wanted
    other = objectives.rejected(context, context.model())
    lengths = {key: max(int(rows.scan.tokens[i]) for rows in (chosen, other)) for key, i in first.items()}
    label = f"gradients of the target at {store.folder.name}"
    with (
        library_warnings(),
        progress(label, 2 * sum(lengths.values()), "tokens") as bar,
    ):
        extract_preferences(
            store,
            module,
            answer_losses_for(config.features.method),
            lambda keys: chosen.batch([first[key] for key in keys], module.device),
            lambda keys: other.batch([first[key] for key in keys], module.device),
            lengths,
            updates,
            projector,
            method=config.features.method,  # type: ignore[arg-type]
            token_budget=token_budget(config.features.token_budget, label),
            name=lambda key: chosen.pool.where(first[key]),
            advance=lambda n, tokens: bar.advance(tokens),
            units=taken(job_of(store, bar, lambda unit: sum(2 * lengths[key] for key in store.unit_keys(unit)))),
        )


def described(rule: UpdateRule) -> str:
    """Return an update rule as text, such as `adamw(betas=(0.9, 0.999), eps=1e-08, ...)`.

    Args:
        rule: The rule.
    """
    fields = rule.describe()
    return f"{fields.pop('name')}({', '.join(f'{key}={value}' for key, value in fields.items())})"


def _coverage(params: Mapping[str, Tensor], names: list[str], config: SelectConfig) -> dict[str, Any]:
    """Return the share of the trainable parameters that `names` cover."""
    seen, total = sum(params[n].numel() for n in names), sum(p.numel() for p in params.values())
    if not names:
        raise DataError(
            f"features.method={config.features.method}: none of the {len(params)} trainable parameters can be seen"
        )
    return {"trainable": total, "seen_share": seen / total, "unseen": sorted(set(params) - set(names))}


def work(context: Context, dim: int, prefix: str = "") -> Work:
    """Return the tokens of the warm-up and of the gradients, and the bytes of the features at all checkpoints.

    Args:
        context: What is scored.
        dim: The number of values per feature.
        prefix: The prefix of the names of the stores.
    """
    config, pool, target = context.config, context.pool, context.wanted
    warm, rows, steps = warm_up_to_come(context)
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    if rows:
        label = f"warm-up on {rows} rows"
        whole[label], left[label] = map(float, warm)
    for step in steps:
        for kept_in, part, name in (
            (f"train-{step}", pool, "pool"),
            (objectives.folder(config, step), target, "target"),
        ):
            store = f"{prefix}{kept_in}"
            label = f"gradients of the {name} at {store}"
            whole[label], left[label] = tokens_of(part, context.features_folder / store)
    each = dim * ENCODINGS[config.features.dtype].bits // 8 + 8
    return Work(whole, left, (len(pool.unique()) + len(target.unique())) * each * len(steps))


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the features of this run and their checkpoints.

    Args:
        config: The settings of the finished run.
    """
    return [
        f"--set features.folder={config.features.folder or config.out / 'features'}",
        *(f"--checkpoints {stop.folder}" for stop in stops(config, config.out)),
    ]
