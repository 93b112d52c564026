"""How rows are scored: LESS and the baselines that must stand beside it. `SCORERS` is the table by name.

Each takes the pool, the target and a `Context` and returns `Scored`; choosing, writing and reporting are the same for
all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import (
    AGGREGATIONS,
    PROJECTORS,
    Candidates,
    DataError,
    GradientFeatures,
    OtherFeatures,
    UsageError,
    aggregate,
    did_you_mean,
    extract,
    files,
    influence,
    influence_paper,
    subtask_means,
    token_batches,
    visit_per_sample_grads,
)
from optim import SGDRule, UpdateMap, UpdateRule
from pipelines.models import load as models
from pipelines.models.base import unload
from pipelines.models.lora import add_lora
from pipelines.models.losses import last_states, losses_for, row_losses, seen_parameters
from pipelines.rows.rows import Rows
from pipelines.runs import numerics
from pipelines.runs.folder import Run
from pipelines.runs.messages import library_warnings, say, warn
from pipelines.runs.progress import progress
from pipelines.runs.provenance import peak_rss_bytes
from pipelines.runs.seeds import derive_seed
from pipelines.settings.select import SelectConfig
from pipelines.training import checkpoint_files, checkpoints, cost, fit, optimizers

FEATURE_VERSION = "2"
"""Raise it when the same model, row and settings give other features: stores made before are then refused, not
mixed."""


@dataclass
class Scored:
    """One number a pool row, higher is better, and what is known about how it came to be."""

    scores: Tensor
    """float32 [n]; NaN where a row has no score."""
    status: dict[int, str] = field(default_factory=dict)
    """Pool row -> "empty" or "nonfinite", where scoring found one."""
    similarity: Tensor | None = None
    """float32 [n, m]: each pool row beside each target row."""
    subtasks: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Tensor | None = None
    formula: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    feature_bytes: int = 0
    tokens: int = 0
    """Tokens that went through a model for this score, over all attempts."""


@dataclass
class Context:
    """What a scorer may use. `model()` loads the model on first use: word-based methods never pay for it."""

    config: SelectConfig
    run: Run
    pool: Rows
    target: Rows | None
    model: Callable[[], models.LoadedModel]

    @property
    def wanted(self) -> Rows:
        """The target rows. Raises: UsageError when there are none."""
        if self.target is None:
            raise UsageError(f"--method {self.config.method} compares with target rows; name them with --target FILE")
        return self.target

    @property
    def features_folder(self) -> Path:
        """Where gradient features are kept."""
        return self.config.features.folder or self.run.path("features")


def subtask_groups(target: Rows) -> tuple[list[str], Tensor]:
    """Names of the subtasks, sorted, and the subtask int64 [m] of each usable target row; "target" is one without."""
    rows = [target.pool[int(i)] for i in np.flatnonzero(target.usable)]
    named = [row.subtask or "target" for row in rows]
    names = sorted(set(named))
    return names, torch.tensor([names.index(name) for name in named])


def _from_similarity(context: Context, similarity: Tensor, good: Tensor | None = None) -> Scored:
    """Similarity [usable pool rows, usable target rows] -> `Scored` over the whole pool.

    good: bool [usable pool rows]; the others are marked "nonfinite" and have no score.
    """
    pool, how = context.pool, context.config.aggregate
    names, groups = subtask_groups(context.wanted)
    usable = torch.from_numpy(np.flatnonzero(pool.usable))
    columns, of = (
        (subtask_means(similarity, groups), torch.arange(len(names))) if how == "paper" else (similarity, groups)
    )
    values = aggregate(columns, of, how, keys=[pool.keys[i] for i in usable.tolist()], eligible=good)
    bad = [] if good is None else usable[~good].tolist()
    whole = _spread(similarity, usable, len(pool))
    whole[bad] = float("nan")
    return Scored(
        _spread(values, usable, len(pool)),
        status=dict.fromkeys(bad, "nonfinite"),
        similarity=whole,
        subtasks={name: whole[:, groups == i].mean(1) for i, name in enumerate(names)},
    )


def _spread(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """`values` [k, ...] of the pool rows `rows` [k] as float32 [n, ...], NaN elsewhere."""
    return torch.full((n, *values.shape[1:]), float("nan")).index_copy(0, rows, values.float())


def candidates(pool: Rows, scored: Scored | None = None) -> Candidates:
    """The rows that may be chosen: usable and, where rows have scores, with a finite one and no status against it."""
    eligible, scores = torch.from_numpy(pool.usable), None
    if scored is not None:
        for row in scored.status:
            eligible[row] = False
        if scored.scores.isfinite().any():
            eligible &= scored.scores.isfinite()
            scores = torch.where(eligible, scored.scores, 0.0)
    return Candidates(
        # rows of equal content tie by their id
        keys=[f"{key} {identity}" for key, identity in zip(pool.keys, pool.pool.ids, strict=True)],
        scores=scores,
        sources=pool.pool.sources,
        tokens=pool.scan.tokens,
        supervised=pool.scan.supervised,
        eligible=eligible,
    )


# ------------------------------------------------------------------------------------------------------------- LESS


_AGGREGATED = {
    "less": "max over subtasks, mean over target rows z' of",
    "paper": "max over subtasks; z' is the mean gradient of a subtask;",
    "mean": "mean over subtasks, mean over target rows z' of",
    "max": "max over target rows z' of",
    "round_robin": "1 - place / n, where target rows z' in turn take the best row left by",
    "bids": "1 - place / n, where the least-served subtask takes its best row left by the normalised",
}


def less(context: Context) -> Scored:
    """sum_c lr_c cos(update of the optimizer for one pool row, gradient of one target row), at the checkpoints c.

    Source: Xia et al. 2024, arXiv 2402.04333. Differs: the optimizer may be any of the suite; the update is the paper's
    (see features.adam_mode).
    """
    config, run = context.config, context.run
    found, tokens = _warm_up(context)
    run.provenance["checkpoints"] = [str(c.folder.name) for c in found]
    pool_rows, target_rows = context.pool.unique(), context.wanted.unique()
    scored = Scored(torch.empty(0), tokens=tokens)
    stores: list[tuple[GradientFeatures, GradientFeatures]] = []
    for checkpoint in found:
        with run.stage(f"features at step {checkpoint.step}"):
            train, target = _features(context, checkpoint, pool_rows, target_rows, scored)
            stores.append((train, target))
    with run.stage("scores"):
        _score(context, found, stores, scored)
    mode = {"paper": "less-paper", "code": "less-official", "precond_only": "less-preconditioner"}[
        config.features.adam_mode
    ]
    rule = scored.formula["rule"]
    scored.formula |= {
        "name": mode if rule == "adamw" else f"less-{rule}",
        "text": f"score(z) = {_AGGREGATED[config.aggregate]} "
        f"sum_c w_c cos( {rule} update of grad l(z; theta_c), grad l(z'; theta_c) ),  "
        "w_c = mean learning rate of c / sum",
    }
    return scored


def warm_up_rows(context: Context) -> list[int]:
    """The pool rows of the warm-up: those it began with, or a random share drawn by content.

    A pool that has grown since keeps its warm-up: its rows, and so its checkpoints.
    Raises: DataError when some of those are no longer in the pool.
    """
    config, pool = context.config, context.pool
    manifest = context.run.path("warmup", "rows.json")
    if manifest.is_file():
        by_key = {key: i for i, key in enumerate(pool.keys) if key}
        recorded = files.read_json(manifest)["keys"]
        if gone := [key for key in recorded if key not in by_key]:
            raise DataError(f"{len(gone)} of {len(recorded)} warm-up rows are no longer in the pool; use --overwrite")
        return [by_key[key] for key in recorded]
    usable = np.flatnonzero(pool.usable)
    count = min(len(usable), max(config.warmup.minimum_rows, int(config.warmup.fraction * len(usable) + 1e-9)))
    # by content, so that the order of the input files does not change the sample
    ordered = sorted(usable.tolist(), key=lambda i: pool.keys[i])
    generator = np.random.Generator(np.random.Philox(derive_seed(config.seed, "warm-up rows")))
    return [ordered[i] for i in generator.permutation(len(ordered))[:count]]


def _warm_up(context: Context) -> tuple[list[checkpoints.Checkpoint], int]:
    """The checkpoints to take gradients at: the user's, or those of a warm-up on a random share of the pool."""
    config, run, pool = context.config, context.run, context.pool
    if config.checkpoints:
        return checkpoints.find(config.checkpoints), 0
    folder = run.path("warmup")
    recipe = config.warmup
    manifest = folder / "rows.json"
    with run.stage("warm-up"):
        rows = warm_up_rows(context)
        if not manifest.is_file():
            files.make_folder(folder)
            files.write_json(manifest, {"keys": [pool.keys[i] for i in rows]})
        steps = fit.planned_steps(len(rows), recipe)
        tokens = int(pool.scan.tokens[rows].sum()) * recipe.epochs
        stops = fit.planned_checkpoints(len(rows), recipe)
        if len(checkpoint_files.checkpoints(folder, stops)) < len(stops):
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
                    advance=bar.advance,
                )
            unload(wrapped)
    found = checkpoints.find([folder])
    kept = found[-recipe.checkpoints :] if recipe.checkpoints else found
    total = sum(c.mean_lr for c in kept)
    return [checkpoints.Checkpoint(c.folder, c.step, c.mean_lr, c.mean_lr / total) for c in kept], tokens


def _features(
    context: Context,
    checkpoint: checkpoints.Checkpoint,
    pool_rows: Mapping[str, int],
    target_rows: Mapping[str, int],
    scored: Scored,
) -> tuple[GradientFeatures, GradientFeatures]:
    """The stores of the pool's updates and of the target's plain gradients at one checkpoint, filled."""
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
        _coverage(scored, params, names, config)
        if config.features.adam_mode == "code" and (text := checkpoints.epsilon_warning(state)):
            run.warnings.append(text)
        train_map = checkpoints.restrict(state, names)
        target_map = checkpoints.restrict(state, names, SGDRule())
        rule = next(iter(train_map.rules.values()))
        scored.formula.update(rule=rule.name, settings=_described(rule))
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
        stores = []
        jobs = (("train", context.pool, pool_rows, train_map), ("target", context.wanted, target_rows, target_map))
        for kind, rows, first, updates in jobs:
            meta = {**common, "gradient": sorted({_described(r) for r in updates.rules.values()})}
            folder = context.features_folder / f"{kind}-{checkpoint.step}"
            with _filling(folder):
                store = _open_store(
                    context,
                    folder,
                    first,
                    meta=meta,
                    dim=projector.dim,
                    dtype=config.features.dtype,
                    rows_per_unit=config.features.rows_per_unit,
                )
                _fill(context, store, module, kind, rows, first, updates, projector, scored)
            stores.append(store)
        scored.checkpoints.append(
            {
                "path": checkpoint.folder.name,
                "step": checkpoint.step,
                "mean_lr": checkpoint.mean_lr,
                "weight": checkpoint.weight,
            }
        )
        return stores[0], stores[1]


@contextmanager
def _filling(folder: Path) -> Iterator[None]:
    """The store in `folder` for this run alone: another run that fills it is waited for, and what it made is used."""
    if folder.is_symlink():
        raise DataError(f"{folder} is a symbolic link; nothing is written through it: remove it")

    def waiting(owner: str) -> None:
        say(f"waiting for {owner}, which computes features in {folder}")

    with files.lock_folder(folder, waiting):
        yield


def _open_store(
    context: Context, folder: Path, rows: Mapping[str, int], *, meta: Mapping[str, Any], **options: Any
) -> GradientFeatures:
    """The store in `folder`, planned for `rows` and checked: what is missing in it now is this run's to compute.

    What decides last bits is in its plan. A store that was begun with other numerics is used, and that is said.
    """
    now = numerics.facts()
    begun: dict[str, Any] | None = now
    if (folder / "plan.json").is_file():  # asked before this run plans rows there, or neither could ever finish
        there = GradientFeatures.open(folder)
        _refuse_unfinished(there, rows)
        begun = there.meta.get(numerics.GROUP)  # absent where an earlier version wrote it
    if isinstance(begun, dict):
        options["meta"] = {**meta, numerics.GROUP: begun}
    else:
        options["meta"] = meta
    try:
        store = GradientFeatures.create_or_open(folder, keys=list(rows), **options)
    except OtherFeatures:
        # of its own features a run may go on past a change that was accepted: with new ones
        if context.config.features.folder is not None or not context.run.provenance["changed"]:
            raise
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        files.move(folder, aside)
        say(f"{folder} was made before what has changed: it is in {aside.name}, and computed again")
        begun, options["meta"] = now, {**meta, numerics.GROUP: now}
        store = GradientFeatures.create_or_open(folder, keys=list(rows), **options)
    store.verify()  # a damaged unit is set aside and computed again; its bytes are read for scoring anyway
    _refuse_unfinished(store, rows)
    if isinstance(begun, dict) and store.missing_units() and (odd := numerics.differences(begun, numerics.facts())):
        warn(f"{folder} was begun with other numerics ({odd}): its rows and those of this run differ by rounding")
    return store


def _refuse_unfinished(store: GradientFeatures, rows: Mapping[str, int]) -> None:
    """Refuse a shared store in which rows that this run does not have are planned and not computed."""
    unknown = {key for unit in store.missing_units() for key in store.unit_keys(unit)} - set(rows)
    if unknown:
        raise DataError(
            f"{store.folder}: {len(unknown)} rows that another run planned there are not computed yet; finish that "
            "run first, or choose another features.folder"
        )


def _fill(
    context: Context,
    store: GradientFeatures,
    module: Any,
    kind: str,
    rows: Rows,
    first: Mapping[str, int],
    updates: UpdateMap,
    projector: Any,
    scored: Scored,
) -> None:
    missing = {key for unit in store.missing_units() for key in store.unit_keys(unit)}
    scored.tokens += sum(int(rows.scan.tokens[i]) for i in first.values())
    if not missing:
        return
    lengths = {key: int(rows.scan.tokens[first[key]]) for key in missing}
    total, todo = sum(int(rows.scan.tokens[i]) for i in first.values()), sum(lengths.values())
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


def _coverage(scored: Scored, params: Mapping[str, Tensor], names: list[str], config: SelectConfig) -> None:
    seen, total = sum(params[n].numel() for n in names), sum(p.numel() for p in params.values())
    if not names:
        raise DataError(
            f"features.method={config.features.method}: none of the {len(params)} trainable parameters can be seen"
        )
    unseen = sorted(set(params) - set(names))
    scored.coverage = {"trainable": total, "seen_share": seen / total, "unseen": unseen}


def _score(
    context: Context,
    found: list[checkpoints.Checkpoint],
    stores: list[tuple[GradientFeatures, GradientFeatures]],
    scored: Scored,
) -> None:
    """Fill `scored` from the stores, block by block."""
    pool, target = context.pool, context.wanted
    how = context.config.aggregate
    usable = torch.from_numpy(np.flatnonzero(pool.usable))
    keys = [pool.keys[i] for i in usable.tolist()]
    wanted = np.flatnonzero(target.usable).tolist()
    target_keys = [target.keys[i] for i in wanted]
    names, groups = subtask_groups(target)
    train, weights = [pair[0] for pair in stores], [c.weight for c in found]
    features, norms = [], torch.zeros(len(keys))
    good = torch.ones(len(keys), dtype=torch.bool)
    for (updates, gradients), weight in zip(stores, weights, strict=True):
        held = gradients.rows()
        states, length = dict(zip(held.keys, held.status, strict=True)), dict(zip(held.keys, held.norms, strict=True))
        if dead := [row for row, key in zip(wanted, target_keys, strict=True) if states[key] != "ok"]:
            raise DataError(
                f"target row {target.pool.where(dead[0])} has no finite, non-zero gradient ({len(dead)} such rows in "
                f"{gradients.folder.name}); remove it from the target"
            )
        features.append(
            [
                (
                    target_keys,
                    gradients.take(target_keys),
                    torch.stack([length[k] for k in target_keys]),
                    ["ok"] * len(wanted),
                )
            ]
        )
        rows = updates.rows()
        place = {key: i for i, key in enumerate(rows.keys)}
        at = [place[key] for key in keys]
        norms += weight * rows.norms[torch.tensor(at)]
        for i, row in enumerate(at):
            if rows.status[row] != "ok":
                scored.status[int(usable[i])] = rows.status[row]
                good[i] = False
    similarity = influence(train, features, weights, keys=keys)
    columns, of = (
        (influence_paper(train, features, weights, groups, keys=keys), torch.arange(len(names)))
        if how == "paper"
        else (similarity, groups)
    )
    values = aggregate(columns, of, how, keys=keys, eligible=good)
    similarity[~good] = float("nan")
    scored.similarity = _spread(similarity, usable, len(pool))
    scored.scores, scored.norms = _spread(values, usable, len(pool)), _spread(norms, usable, len(pool))
    scored.subtasks = {name: scored.similarity[:, groups == i].mean(1) for i, name in enumerate(names)}
    scored.feature_bytes = sum(p.stat().st_size for pair in stores for store in pair for p in store.folder.iterdir())


# -------------------------------------------------------------------------------------------------------- baselines


def random(context: Context) -> Scored:
    """No score: rows are drawn uniformly."""
    return Scored(
        torch.full((len(context.pool),), float("nan")),
        formula={"name": "random", "text": "every usable row has the same chance"},
    )


def random_length(context: Context) -> Scored:
    """No score: rows are drawn at random with the answer lengths of the target rows (of the selection, in an audit)."""
    return Scored(
        torch.full((len(context.pool),), float("nan")),
        formula={"name": "random-length", "text": "rows at random, answers as long as those of the target rows"},
    )


def tfidf(context: Context) -> Scored:
    """Cosine of TF-IDF vectors (words and word pairs, sublinear counts) of whole rows, prompt and answer."""
    with context.run.stage("scores"):
        similarity = word_similarity(context.pool, context.wanted)
    scored = _from_similarity(context, similarity)
    scored.formula = {"name": "tfidf", "text": "cosine of TF-IDF vectors of pool row and target rows; no model is used"}
    return scored


def word_similarity(pool: Rows, target: Rows) -> Tensor:
    """float32 [usable pool rows, usable target rows]: cosines of TF-IDF vectors.

    Source: scikit-learn's TfidfVectorizer, fitted on pool and target together.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, wanted = ([rows.pool[i].whole for i in np.flatnonzero(rows.usable).tolist()] for rows in (pool, target))
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), dtype=np.float32, token_pattern=r"(?u)\b\w+\b")
    try:
        matrix = vectorizer.fit_transform(texts + wanted)
    except ValueError as error:  # "empty vocabulary": letters and digits make words, nothing else does
        raise DataError("--method tfidf: no row of the pool or the target holds a word; use another method") from error
    similarity = (matrix[: len(texts)] @ matrix[len(texts) :].T).toarray()
    return torch.from_numpy(np.asarray(similarity, dtype=np.float32))


def rds(context: Context) -> Scored:
    """RDS+: cosine of hidden states of the last layer, averaged over positions with weights 1, 2, ..., s.

    Source: Ivison et al. 2025, arXiv 2503.01807. Differs: rows are ranked by `aggregate`, as for every method; the
    paper takes turns between target rows (`--set aggregate=round_robin`).
    """
    with context.run.stage("hidden states"):
        pool, good = _hidden_states(context, "pool", context.pool)
        target, finite = _hidden_states(context, "target", context.wanted)
    if not bool(finite.all()):
        dead = np.flatnonzero(context.wanted.usable)[~finite.numpy()]
        raise DataError(
            f"target row {context.wanted.pool.where(int(dead[0]))} has hidden states that are not finite ({len(dead)} "
            "such rows); remove it from the target"
        )
    scored = _from_similarity(context, pool @ target.T, good)
    scored.formula = {
        "name": "rds+",
        "text": "cosine of position-weighted mean hidden states (last layer) of pool and target row",
    }
    scored.tokens = context.pool.tokens() + context.wanted.tokens()
    return scored


def _hidden_states(context: Context, kind: str, rows: Rows) -> tuple[Tensor, Tensor]:
    """Unit vectors [usable rows, hidden size] and which are finite, kept in a store, so that they are computed once."""
    loaded, unique = context.model(), rows.unique()
    model = loaded.model
    with torch.inference_mode():  # the width is what the model returns: some configurations name another (OPT-350m)
        shortest = min(unique.values(), key=lambda i: int(rows.scan.tokens[i]))
        size = last_states(model, rows.batch([shortest], model.device)["input_ids"]).shape[-1]
    meta = {
        "format": FEATURE_VERSION,
        "model": dict(loaded.digests),
        "encoding": rows.encoder.fingerprint(),
        "feature": "position-weighted mean of the last hidden states",
        "precision": str(model.dtype),
    }
    folder = context.features_folder / f"hidden-{kind}"
    with _filling(folder):
        store = _open_store(context, folder, unique, meta=meta, dim=size, dtype="float32")
        budget = context.config.features.token_budget
        todo = sum(int(rows.scan.tokens[unique[k]]) for u in store.missing_units() for k in store.unit_keys(u))
        with progress(f"hidden states of the {kind}", todo, "tokens") as bar, torch.inference_mode():
            for unit in store.missing_units():
                keys = store.unit_keys(unit)
                lengths = [int(rows.scan.tokens[unique[key]]) for key in keys]
                found = torch.zeros(len(keys), size)
                for group in token_batches(lengths, budget):
                    batch = rows.batch([unique[keys[i]] for i in group], model.device)["input_ids"]
                    hidden = last_states(model, batch).float()
                    position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=torch.float32)
                    real = position <= torch.tensor([lengths[i] for i in group], device=hidden.device)[:, None]
                    weight = position * real
                    mean = (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
                    found[torch.tensor(group)] = mean.cpu()
                    bar.advance(sum(lengths[i] for i in group))
                store.write_unit(unit, found)
    keys = [rows.keys[i] for i in np.flatnonzero(rows.usable).tolist()]
    held = store.rows()
    finite = {key for key, status in zip(held.keys, held.status, strict=True) if status == "ok"}
    return store.take(keys), torch.tensor([key in finite for key in keys])


def loss(context: Context) -> Scored:
    """The row's own mean loss under the model: the rows that it finds hardest come first.

    Source: the perplexity baseline of Yin & Rush 2024, arXiv 2410.16208 ("top" variant).
    """
    loaded = context.model()
    pool = context.pool
    chosen = np.flatnonzero(pool.usable).tolist()
    lengths = [int(pool.scan.tokens[i]) for i in chosen]
    scores = torch.full((len(pool),), float("nan"))
    with (
        context.run.stage("losses"),
        progress("losses of the pool", sum(lengths), "tokens") as bar,
        torch.inference_mode(),
    ):
        for group in token_batches(lengths, context.config.features.token_budget):
            batch = pool.batch([chosen[i] for i in group], loaded.model.device)
            values = row_losses(loaded.model, batch)
            scores[torch.tensor([chosen[i] for i in group])] = values.float().cpu()
            bar.advance(sum(lengths[i] for i in group))
    status = {i: "nonfinite" for i in chosen if not scores[i].isfinite()}
    return Scored(
        scores,
        status=status,
        tokens=sum(lengths),
        formula={"name": "loss", "text": "mean loss of the row's own answer tokens"},
    )


SCORERS: dict[str, Callable[[Context], Scored]] = {
    "less": less,
    "random": random,
    "random-length": random_length,
    "tfidf": tfidf,
    "rds": rds,
    "loss": loss,
}


def check(config: SelectConfig) -> None:
    """Refuse names that do not exist before anything is read: a slip must not cost a warm-up. Raises: UsageError."""
    for setting, name, known in (
        ("projector.name", config.projector.name, list(PROJECTORS)),
        ("features.method", config.features.method, ["hooks", "loop", "vmap"]),
        ("aggregate", config.aggregate, list(AGGREGATIONS)),
    ):
        if name not in known:
            raise UsageError(f"{setting}: there is no '{name}'{did_you_mean(name, known)}")
    optimizers.check(config.warmup)


def pace(context: Context, samples: int = 2, *, backward: bool = True) -> tuple[float, int]:
    """Measured seconds a token, on made-up rows of the pool's median length, and the bytes of memory at the peak.

    backward: forward and the gradients of each row, at the user's first checkpoint or with fresh adapters; else forward
    alone.
    """
    loaded, pool = context.model(), context.pool
    length = int(np.median(pool.scan.tokens[pool.usable]))
    batch = cost.made_up(loaded.model, length, 256)
    times = []
    method: Any = context.config.features.method
    losses = losses_for(method)
    with torch.random.fork_rng(devices=[]), _as_trained(context) if backward else nullcontext(loaded.model) as module:
        names = seen_parameters(module, checkpoints.trainable(module), method) if backward else []
        kept = cost.saved(module, batch) / batch["input_ids"].numel() if backward else 0.0
        for _ in range(samples):
            begin = time.perf_counter()
            if backward:
                with library_warnings():
                    visit_per_sample_grads(losses, module, batch, names, lambda name, grad: None, method=method)
            else:
                with torch.inference_mode():
                    row_losses(module, batch)
            times.append(time.perf_counter() - begin)
    config = context.config
    width = max(config.features.token_budget, config.warmup.micro_tokens if backward else 0)
    return min(times) / batch["input_ids"].numel(), int(peak_rss_bytes() + kept * width)


@contextmanager
def _as_trained(context: Context) -> Iterator[Any]:
    """The model at the user's first checkpoint, a whole one's by the model itself, or with fresh adapters."""
    config, model = context.config, context.model().model
    if not config.checkpoints:
        module = add_lora(model, config.lora, seed=0).eval()
        try:
            yield module
        finally:
            unload(module)
        return
    first = checkpoints.find(config.checkpoints)[0]
    if not first.is_adapter:
        yield model
        return
    with checkpoints.at(first, config.model, model) as module:
        yield module
