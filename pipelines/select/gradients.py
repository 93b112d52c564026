"""Gradients of the pool and the target at the checkpoints, projected and kept, and the scores that they give.

Shared by the methods that compare an optimizer's update for a pool row with the gradient of a target row; what differs
between them is how a gradient becomes a feature (`Recipe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import (
    ENCODINGS,
    DataError,
    GradientFeatures,
    LessScores,
    Projector,
    extract,
    extract_preferences,
    files,
    less_scores,
)
from optim import SGDRule, UpdateMap, UpdateRule
from pipelines.models.losses import answer_losses_for, losses_for, seen_parameters
from pipelines.rows.rows import Rows
from pipelines.runs.messages import library_warnings
from pipelines.runs.progress import progress
from pipelines.select import objectives
from pipelines.select.scored import Context, Scored, common_rows, spread, subtask_groups, unique_among
from pipelines.select.scorer import Asked, Work
from pipelines.select.stores import FEATURE_VERSION, filling, kept, open_store, tokens_of
from pipelines.select.warm_up import stops, warm_up, warm_up_to_come
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoints


@dataclass(frozen=True)
class At:
    """A checkpoint of the model, for the choice of a projector.

    Attributes:
        context: What is being scored.
        checkpoint: The checkpoint.
        module: The model there.
        names: The parameters whose gradients are seen.
        plain: Their plain gradients, as a map.
        meta: What features at this checkpoint are a function of, but for the projector.
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
        projector: From gradients to features.
        prefix: Of the names of the stores.
        plain: Whether pool rows are compared by their plain gradients instead of the optimizer's updates.
    """

    projector: Callable[[At], Projector]
    prefix: str = ""
    plain: bool = False


@dataclass(frozen=True)
class Features:
    """The filled stores of one checkpoint, and what made them."""

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
    """The stores of the pool's updates and of the target's plain gradients at one checkpoint."""
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
        names = seen_parameters(module, params, config.features.method)
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
    """The checkpoints, the features of the usable pool rows `chosen` at each, and the tokens of the warm-up."""
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
    """Compute what is missing in the store: of the rows `planned`, and of an earlier shortlist."""
    first = rows.unique()
    missing = {key for unit in store.missing_units() for key in store.unit_keys(unit)}
    if not missing:
        return
    lengths = {key: int(rows.scan.tokens[first[key]]) for key in missing}
    todo = sum(lengths.values())
    total = todo + sum(int(rows.scan.tokens[i]) for key, i in planned.items() if key not in missing)
    where = "pool" if rows is context.pool else "target"
    with (
        library_warnings(),
        progress(f"gradients of the {where} at {store.folder.name}", total, "tokens", done=total - todo) as bar,
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
            token_budget=context.config.features.token_budget,
            advance=lambda n, tokens: bar.advance(tokens),
        )


def _fill_pairs(
    context: Context,
    store: GradientFeatures,
    module: Any,
    first: Mapping[str, int],
    updates: UpdateMap,
    projector: Any,
) -> None:
    """Compute what is missing in the store of the target's pairs: both answers of each."""
    if not store.missing_units():
        return
    config, chosen = context.config, context.wanted
    other = objectives.rejected(context, context.model())
    lengths = {key: max(int(rows.scan.tokens[i]) for rows in (chosen, other)) for key, i in first.items()}
    with (
        library_warnings(),
        progress(f"gradients of the target at {store.folder.name}", 2 * sum(lengths.values()), "tokens") as bar,
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
            token_budget=config.features.token_budget,
            advance=lambda n, tokens: bar.advance(tokens),
        )


def described(rule: UpdateRule) -> str:
    """`adamw(betas=(0.9, 0.999), eps=1e-08, ...)`."""
    fields = rule.describe()
    return f"{fields.pop('name')}({', '.join(f'{key}={value}' for key, value in fields.items())})"


def _coverage(params: Mapping[str, Tensor], names: list[str], config: SelectConfig) -> dict[str, Any]:
    """Which of the trainable parameters `names` are."""
    seen, total = sum(params[n].numel() for n in names), sum(p.numel() for p in params.values())
    if not names:
        raise DataError(
            f"features.method={config.features.method}: none of the {len(params)} trainable parameters can be seen"
        )
    return {"trainable": total, "seen_share": seen / total, "unseen": sorted(set(params) - set(names))}


def result(
    context: Context, chosen: list[int], found: list[checkpoints.Checkpoint], made: list[Features], how: str
) -> LessScores:
    """What the stores say about the usable pool rows `chosen`."""
    pool, target = context.pool, context.wanted
    wanted = np.flatnonzero(target.usable).tolist()
    target_keys = objectives.keys(context.config, target)
    for one in made:
        refuse_dead_targets(one.target, target, wanted, target_keys)
    return less_scores(
        [one.train for one in made],
        [one.target for one in made],
        [c.weight for c in found],
        subtask_groups(target)[1],
        keys=[pool.keys[i] for i in chosen],
        target_keys=target_keys,
        how=how,
        advantages=objectives.weights(context.config, target),
        common=context.config.common,
        sample=_sample(pool, context.config),
    )


def _sample(pool: Rows, config: SelectConfig) -> list[str]:
    """The keys of the rows that show common directions; none where these stay."""
    return [] if config.common is None else [pool.keys[i] for i in common_rows(pool, config.seed)]


def scored(
    context: Context,
    chosen: list[int],
    found: list[checkpoints.Checkpoint],
    made: list[Features],
    tokens: int,
    formula: Mapping[str, Any],
) -> Scored:
    """Scores from the stores, over the whole pool."""
    config, pool = context.config, context.pool
    usable = torch.tensor(chosen, dtype=torch.int64)
    names, groups = subtask_groups(context.wanted)
    of = result(context, chosen, found, made, config.aggregate)
    similarity = spread(of.similarity, usable, len(pool))
    return Scored(
        scores=spread(of.scores, usable, len(pool)),
        formula=formula,
        status={int(usable[i]): status for i, status in of.status.items()},
        similarity=similarity,
        subtasks={name: similarity[:, groups == i].mean(1) for i, name in enumerate(names)},
        norms=spread(of.norms, usable, len(pool)),
        coverage=made[-1].coverage,
        checkpoints=[{"path": c.folder.name, "step": c.step, "mean_lr": c.mean_lr, "weight": c.weight} for c in found],
        feature_bytes=sum(
            p.stat().st_size for one in made for s in (one.train, one.target) for p in s.folder.iterdir()
        ),
        tokens=tokens,
    )


def refuse_dead_targets(
    store: GradientFeatures, target: Rows, wanted: list[int], keys: list[str] | None = None
) -> None:
    """Refuse target rows without a finite, non-zero gradient; `keys` are theirs in the store (None: the rows' own)."""
    keys = [target.keys[row] for row in wanted] if keys is None else keys
    held = store.rows()
    states = dict(zip(held.keys, held.status, strict=True))
    if dead := [row for row, key in zip(wanted, keys, strict=True) if states[key] != "ok"]:
        raise DataError(
            f"target row {target.pool.where(dead[0])} has no finite, non-zero gradient ({len(dead)} such rows in "
            f"{store.folder.name}); remove it from the target"
        )


def work(context: Context, dim: int, prefix: str = "") -> Work:
    """Tokens of the warm-up and of the gradients, and the bytes of the features at all checkpoints."""
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
    """The run's features, and the checkpoints that they belong to."""
    return [
        f"--set features.folder={config.features.folder or config.out / 'features'}",
        *(f"--checkpoints {stop.folder}" for stop in stops(config, config.out)),
    ]


def nearest(asked: Asked, prefix: str = "") -> Tensor:
    """The weighted cosines of the features that the run has kept."""
    found = stops(asked.config, asked.folder)
    home = kept(asked, *(f"{prefix}train-{stop.step}" for stop in found))
    keys = objectives.keys(asked.config, asked.target)
    return less_scores(
        [GradientFeatures.open(home / f"{prefix}train-{stop.step}") for stop in found],
        [GradientFeatures.open(home / f"{prefix}{objectives.folder(asked.config, stop.step)}") for stop in found],
        [stop.weight for stop in found],
        torch.zeros(len(keys), dtype=torch.int64),
        keys=[asked.pool.keys[asked.index]],
        target_keys=keys,
        how="mean",
        common=asked.config.common,
        sample=_sample(asked.pool, asked.config),
        advantages=objectives.weights(asked.config, asked.target),
    ).similarity[0]
