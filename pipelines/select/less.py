"""LESS: rows whose update, by the optimizer, would lower the loss on the target rows most.

From top to bottom: a warm-up on a random share of the pool gives checkpoints; at each of them the updates of the pool's
rows and the gradients of the target's rows become features; their cosines, weighted by learning rate, become scores.

Source: Xia et al. 2024, arXiv 2402.04333.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import (
    AGGREGATIONS,
    ENCODINGS,
    PROJECTORS,
    DataError,
    GradientFeatures,
    LessScores,
    extract,
    files,
    less_scores,
)
from optim import AdamWRule, SGDRule, UpdateMap, UpdateRule
from pipelines.models.losses import losses_for, seen_parameters
from pipelines.rows.rows import Rows
from pipelines.runs.messages import library_warnings
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.select.layers import layers_of
from pipelines.select.scored import Context, Scored, spread, subtask_groups, unique_among, usable_among
from pipelines.select.scorer import Asked, Work
from pipelines.select.stores import FEATURE_VERSION, filling, kept, open_store, tokens_of
from pipelines.select.warm_up import stops, warm_up, warm_up_to_come
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoints

METHOD = Method(
    summary="gradient influence on the target rows (Xia et al. 2024)",
    title="LESS",
    meaning="The score is a cosine between the update that a row would cause and the gradient of the target rows, "
    "averaged over the checkpoints by their weight and, in its best subtask, over the target rows. Above zero: to "
    "first order, training on the row lowers the loss on the target; below zero: it raises it.",
    label="less",
    needs=("target", "model", "gradients"),
    stored=True,
    nearest="target rows it helps most",
    measure="cosine, weighted over checkpoints",
    cost="a warm-up run, then forward and backward of every row at each checkpoint",
    limits="the first-order effect of one step per row; short answers tend to score high",
)


def score(context: Context) -> Scored:
    """sum_c w_c cos(update of the optimizer for one pool row, gradient of one target row), at the checkpoints c.

    Differs from the paper: the optimizer may be any of the suite; the update is the paper's (see features.adam_mode).
    """
    chosen = np.flatnonzero(context.pool.usable).tolist()
    found, made, tokens = _gradients(context, chosen)
    with context.run.stage("scores"):
        return _scored(context, chosen, found, made, tokens + sum(one.tokens for one in made))


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """See `Scorer.columns`: the cosines, weighted over checkpoints."""
    chosen, places, n = usable_among(context.pool, rows)
    found, made, _ = _gradients(context, chosen)
    with context.run.stage("scores"):
        return spread(_result(context, chosen, found, made, "mean").similarity, places, n)


def _gradients(context: Context, chosen: list[int]) -> tuple[list[checkpoints.Checkpoint], list[_Features], int]:
    """The checkpoints, the features of the usable pool rows `chosen` at each, and the tokens of the warm-up."""
    run = context.run
    found, tokens = warm_up(context)
    run.provenance["checkpoints"] = [str(c.folder.name) for c in found]
    pool_rows, target_rows = unique_among(context.pool, chosen), context.wanted.unique()
    made: list[_Features] = []
    for checkpoint in found:
        with run.stage(f"features at step {checkpoint.step}"):
            made.append(_features(context, checkpoint, pool_rows, target_rows))
    return found, made, tokens


@dataclass(frozen=True)
class _Features:
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
) -> _Features:
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
        train_map = checkpoints.restrict(state, names)
        target_map = checkpoints.restrict(state, names, SGDRule())
        rule = next(iter(train_map.rules.values()))
        projector = PROJECTORS[config.projector.name].of(
            {name: params[name].shape for name in names}, config.projector.dim, derive_seed(config.seed, "projector")
        )
        common = {
            "format": FEATURE_VERSION,
            "model": dict(loaded.digests),
            "checkpoint": checkpoint.digests(),
            "encoding": context.pool.encoder.fingerprint(),
            "projector": projector.metadata(),
            "parameters": files.digest(repr([(name, tuple(params[name].shape)) for name in names]).encode()),
            "method": config.features.method,
            "token_budget": config.features.token_budget,
            "precision": str(next(module.parameters()).dtype),
        }
        stores, tokens = [], 0
        jobs = (("train", context.pool, pool_rows, train_map), ("target", context.wanted, target_rows, target_map))
        for kind, rows, planned, updates in jobs:
            meta = {**common, "gradient": sorted({_described(r) for r in updates.rules.values()})}
            folder = context.features_folder / f"{kind}-{checkpoint.step}"
            with filling(folder):
                store = open_store(
                    context,
                    folder,
                    planned,
                    among=rows.unique(),
                    meta=meta,
                    dim=projector.dim,
                    dtype=config.features.dtype,
                    rows_per_unit=config.features.rows_per_unit,
                )
                tokens += sum(int(rows.scan.tokens[i]) for i in planned.values())
                _fill(context, store, module, kind, rows, planned, updates, projector)
            stores.append(store)
        return _Features(stores[0], stores[1], tokens, rule, coverage)


def _fill(
    context: Context,
    store: GradientFeatures,
    module: Any,
    kind: str,
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
    where = "pool" if kind == "train" else "target"
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


def _described(rule: UpdateRule) -> str:
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


def _result(
    context: Context, chosen: list[int], found: list[checkpoints.Checkpoint], made: list[_Features], how: str
) -> LessScores:
    """What the stores say about the usable pool rows `chosen`."""
    pool, target = context.pool, context.wanted
    wanted = np.flatnonzero(target.usable).tolist()
    for one in made:
        _refuse_dead_targets(one.target, target, wanted)
    return less_scores(
        [one.train for one in made],
        [one.target for one in made],
        [c.weight for c in found],
        subtask_groups(target)[1],
        keys=[pool.keys[i] for i in chosen],
        target_keys=[target.keys[i] for i in wanted],
        how=how,
    )


def _scored(
    context: Context, chosen: list[int], found: list[checkpoints.Checkpoint], made: list[_Features], tokens: int
) -> Scored:
    """Scores from the stores, over the whole pool."""
    config, pool = context.config, context.pool
    usable = torch.tensor(chosen, dtype=torch.int64)
    names, groups = subtask_groups(context.wanted)
    result = _result(context, chosen, found, made, config.aggregate)
    similarity = spread(result.similarity, usable, len(pool))
    return Scored(
        scores=spread(result.scores, usable, len(pool)),
        formula=_formula(config, made[-1]),
        status={int(usable[i]): status for i, status in result.status.items()},
        similarity=similarity,
        subtasks={name: similarity[:, groups == i].mean(1) for i, name in enumerate(names)},
        norms=spread(result.norms, usable, len(pool)),
        coverage=made[-1].coverage,
        checkpoints=[{"path": c.folder.name, "step": c.step, "mean_lr": c.mean_lr, "weight": c.weight} for c in found],
        feature_bytes=sum(
            p.stat().st_size for one in made for s in (one.train, one.target) for p in s.folder.iterdir()
        ),
        tokens=tokens,
    )


def _refuse_dead_targets(store: GradientFeatures, target: Rows, wanted: list[int]) -> None:
    held = store.rows()
    states = dict(zip(held.keys, held.status, strict=True))
    if dead := [row for row in wanted if states[target.keys[row]] != "ok"]:
        raise DataError(
            f"target row {target.pool.where(dead[0])} has no finite, non-zero gradient ({len(dead)} such rows in "
            f"{store.folder.name}); remove it from the target"
        )


def _formula(config: SelectConfig, made: _Features) -> dict[str, Any]:
    mode = {"paper": "less-paper", "code": "less-official", "precond_only": "less-preconditioner"}
    return {
        "name": mode[config.features.adam_mode] if type(made.rule) is AdamWRule else f"less-{made.rule.name}",
        "text": f"score(z) = {AGGREGATIONS[config.aggregate].formula} "
        f"sum_c w_c cos( {made.rule.name} update of grad l(z; theta_c), grad l(z'; theta_c) ),  "
        "w_c = mean learning rate of c / sum",
        "settings": _described(made.rule),
    }


def work(context: Context) -> Work:
    """Tokens of the warm-up and of the gradients, and the bytes of the features at all checkpoints."""
    config, pool, target = context.config, context.pool, context.wanted
    warm, rows, steps = warm_up_to_come(context)
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    if rows:
        label = f"warm-up on {rows} rows"
        whole[label], left[label] = map(float, warm)
    for step in steps:
        for kind, part, name in (("train", pool, "pool"), ("target", target, "target")):
            label = f"gradients of the {name} at {kind}-{step}"
            whole[label], left[label] = tokens_of(part, context.features_folder / f"{kind}-{step}")
    each = config.projector.dim * ENCODINGS[config.features.dtype].bits // 8 + 8
    return Work(whole, left, (len(pool.unique()) + len(target.unique())) * each * len(steps))


def reuse(config: SelectConfig) -> list[str]:
    """The run's features, and the checkpoints that they belong to."""
    return [
        f"--set features.folder={config.features.folder or config.out / 'features'}",
        *(f"--checkpoints {stop.folder}" for stop in stops(config, config.out)),
    ]


def nearest(asked: Asked) -> Tensor:
    """The weighted cosines of the features that the run has kept."""
    found = stops(asked.config, asked.folder)
    home = kept(asked, *(f"train-{stop.step}" for stop in found))
    keys = [asked.target.keys[i] for i in np.flatnonzero(asked.target.usable).tolist()]
    similarity = torch.zeros(len(keys))
    for stop in found:
        features = GradientFeatures.open(home / f"train-{stop.step}").take([asked.pool.keys[asked.index]])[0]
        similarity += stop.weight * (GradientFeatures.open(home / f"target-{stop.step}").take(keys) @ features)
    return similarity


def layers(asked: Asked, rows: list[int]) -> list[dict[str, Any]]:
    """The share of each layer, at the checkpoint with the largest weight."""
    heaviest = max(stops(asked.config, asked.folder), key=lambda c: c.weight)
    return layers_of(asked.config, heaviest, asked.pool, asked.index, asked.target, rows)
