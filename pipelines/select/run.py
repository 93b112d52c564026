"""`datatools select`: a pool of rows, a few target rows and a model -> the rows worth training on, and why."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from datatools import (
    ENCODINGS,
    Budget,
    Candidates,
    DataError,
    DatatoolsError,
    GradientFeatures,
    Selection,
    UsageError,
    files,
    select,
)
from pipelines.models import load as models
from pipelines.report import page as report
from pipelines.rows import leakage
from pipelines.rows.inputs import Inputs
from pipelines.rows.row import Row
from pipelines.rows.rows import Rows
from pipelines.runs import verdicts
from pipelines.runs.folder import Run
from pipelines.runs.messages import quiet, say, warn
from pipelines.runs.provenance import peak_rss_bytes, versions
from pipelines.runs.redact import command_line
from pipelines.runs.seeds import derive_seed
from pipelines.runs.workers import alone
from pipelines.select import methods
from pipelines.select.methods import Context, Scored
from pipelines.settings import redaction
from pipelines.settings.dump import as_dict, fingerprint
from pipelines.settings.load import load_config
from pipelines.settings.select import NEED_TARGET, SelectConfig
from pipelines.training import checkpoint_files, checkpoints, cost, fit

SHOWN_CHARACTERS = 600  # of a row's text in summary and report
MOST_COLUMNS = 1000
"""Of `selected.parquet`, and fields within one; beyond it values are JSON text."""

EXAMPLES = 10  # best and worst rows shown


def run(config: SelectConfig) -> Path:
    """Select, and write `selected.jsonl`, `selected.parquet`, `scores.parquet`, `summary.json` and `report.html` to
    `out`.

    A run that was interrupted goes on where it stopped; a pool that has grown costs its new rows. A selection that is
    there is never replaced: the same one keeps its audit, another budget, cap or aggregation is refused, and a pool
    that has grown moves the earlier selection to `selected.old-N`.
    Raises: UsageError, DataError, EnvironmentProblem, each with what to do.
    """
    alone("datatools select")
    Budget.parse(config.budget)  # a slip here must not cost a warm-up
    methods.check(config)
    _refuse_another_selection(config)
    if config.dry_run:
        return _dry_run(config)
    with Run(config.out, config, "select", overwrite=config.overwrite) as current:
        context = _context(config, current)
        Budget.parse(config.budget).resolve(methods.candidates(context.pool))  # nor a budget that this pool cannot fill
        with current.stage("cost"):
            before = _estimate(context)
        scored = methods.SCORERS[config.method](context)
        with current.stage("select and write"):
            selection = choose(context, scored)
            summary = _write(context, scored, selection, before)
        path = report.render(current.folder)
    if not quiet():
        report.terminal(summary, Console(stderr=True))
    say(f"report: {path}")
    return config.out


def _refuse_another_selection(config: SelectConfig) -> None:
    """Refuse settings that would replace the selection in `out`, and name the command that makes the other one."""
    folder, path = config.out, config.out / "run.yaml"
    if config.overwrite or not (folder / verdicts.SELECTED).is_file() or not path.is_file():
        return
    try:
        before = load_config(SelectConfig, path)
    except (UsageError, DataError):
        return  # `Run` says what is wrong with it
    if fingerprint(before) != fingerprint(config):
        return  # `Run` says which settings of the whole run differ
    old, new = (as_dict(one, leave_out=("volatile", "elsewhere")) for one in (before, config))
    differing = [f"{name} was {old[name]}, is {new[name]}" for name in old if old[name] != new[name]]
    if not differing:
        return
    reuse = [f"--set features.folder={config.features.folder or folder / 'features'}"]
    if config.method == "less":
        stops = checkpoints.find(config.checkpoints or [folder / "warmup"])
        if not config.checkpoints and config.warmup.checkpoints:
            stops = stops[-config.warmup.checkpoints :]
        reuse += [f"--checkpoints {stop.folder}" for stop in stops]
    again = f" (with {shlex.join(' '.join(reuse).split(' '))} it computes no gradient again)"
    raise UsageError(
        f"{folder} holds a selection made with other settings: {'; '.join(differing)}. {verdicts.SELECTED} is not "
        f"replaced: select into another --out{again if config.method in ('less', 'rds') else ''}, or move the whole "
        f"run to {folder}.old-N with --overwrite"
    )


def _context(config: SelectConfig, current: Run) -> Context:
    """Read and check everything, and compare it with what the run in this folder began with."""
    with current.stage("read"):
        inputs = Inputs(current, config.model, models.load(config.model, tokenizer_only=True))
        pool = inputs.read("pool", config.train, group="data", bad_rows=True)
        target = inputs.read_like("target", config.train, config.target, config.target_columns)
        if target is not None and (empty := [file.path for file in target.pool.files if not file.rows]):
            raise DataError(f"no row in --target {', '.join(empty)}; leave the file out or fill it")
        if target is not None and (known := leakage.find(target, {"pool": (pool, None)})):
            warn(
                f"{leakage.sentence(known).replace('test rows', 'target rows')}: likeness ranks such rows first; a "
                "selection of what is known already is worth little"
            )
    inputs.record(by_content=("data", "target"), grows=("data",))

    @cache
    def model() -> models.LoadedModel:
        with current.stage("load model"):
            return models.load(config.model)

    return Context(config, current, pool, target, model)


# ------------------------------------------------------------------------------------------------------------- cost


def _estimate(context: Context) -> dict[str, Any]:
    """Rows, tokens, seconds and bytes of the whole run, over all attempts, and what is left of it; from a timed batch.

    What lay there before the run began (features that another run computed) is no part of it.
    """
    config, pool, run_ = context.config, context.pool, context.run
    began, spent = run_.seconds, time.monotonic()
    found: dict[str, Any] = {"rows": int(pool.usable.sum()), "tokens": 0, "seconds": None, "bytes": 0}
    whole, left = _parts(context)  # label -> tokens
    memory, based = peak_rss_bytes(), ""
    first = _first_estimate(context, sum(whole.values()) - sum(left.values()))
    todo = sum(left.values())
    if whole:
        if todo or config.dry_run or "seconds_a_token" not in first:
            rate, memory = methods.pace(context, backward=config.method == "less") if todo else (0.0, memory)
            first.setdefault("seconds_a_token", rate)
            based = "timed on made-up tokens"
        first.setdefault("spent", began + time.monotonic() - spent)
        rate = first["seconds_a_token"]
        found["tokens"] = max(0, round(sum(whole.values()) - first["given"]))
        share = found["tokens"] / max(1.0, sum(whole.values()))  # of the whole, what was not there before
        found["seconds"] = first["spent"] + share * sum(_seconds(rate, whole).values())
        found["given"] = first["given"]
        if config.method == "less":
            found["bytes"] = _feature_bytes(context)
        if not config.dry_run:
            files.write_json(run_.path("cost.json"), first)
        run_.expect({label: seconds for label, seconds in _seconds(rate, left).items() if seconds})
    done = found["tokens"] - todo
    cost.Estimate(
        parts=_seconds(first.get("seconds_a_token", 0.0), left),
        tokens=round(todo),
        memory=memory,
        disk=found["bytes"],
        done=f"{found['rows']:,} rows" + (f", {done:,.0f} of {found['tokens']:,} tokens are done" if done > 0 else ""),
        based_on=based,
    ).announce()
    return found


def _first_estimate(context: Context, there: float) -> dict[str, float]:
    """What the first attempt of this run measured; `there` are the tokens whose work is done as an attempt begins."""
    path = context.run.path("cost.json")
    if context.run.resumed and path.is_file():
        with suppress(DatatoolsError):
            kept = files.read_json(path, limit=1_000_000)
            if isinstance(kept, dict) and all(isinstance(kept.get(k), int | float) for k in ("given", "spent")):
                return {str(key): float(value) for key, value in kept.items()}
    return {"given": 0.0 if context.run.resumed else float(there)}


def _parts(context: Context) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens by the label of their progress: of the whole run, and of what is not done yet."""
    config, pool = context.config, context.pool
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    if config.method == "less":
        warm, rows, steps = _warm_up_to_come(context)
        if rows:
            label = f"warm-up on {rows} rows"
            whole[label], left[label] = map(float, warm)
        for step in steps:
            for kind, part, name in (("train", pool, "pool"), ("target", context.wanted, "target")):
                there, unique = _stored(context.features_folder / f"{kind}-{step}"), part.unique()
                label = f"gradients of the {name} at {kind}-{step}"
                whole[label] = float(sum(int(part.scan.tokens[i]) for i in unique.values()))
                left[label] = float(sum(int(part.scan.tokens[i]) for key, i in unique.items() if key not in there))
    elif config.method == "rds":
        for name, part in (("pool", pool), ("target", context.wanted)):
            there, unique = _stored(context.features_folder / f"hidden-{name}"), part.unique()
            label = f"hidden states of the {name}"
            whole[label] = float(sum(int(part.scan.tokens[i]) for i in unique.values()))
            left[label] = float(sum(int(part.scan.tokens[i]) for key, i in unique.items() if key not in there))
    elif config.method == "loss":
        whole["losses of the pool"] = left["losses of the pool"] = float(pool.tokens())
    return whole, left


def _seconds(rate: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Tokens by part as seconds."""
    # a training token costs about a quarter more: LoRA runs beside its layer, padding is not sorted away
    return {name: rate * tokens * (1.25 if name.startswith("warm-up") else 1.0) for name, tokens in parts.items()}


def _feature_bytes(context: Context) -> int:
    """Of the features at all checkpoints, once they are there."""
    config = context.config
    each = config.projector.dim * ENCODINGS[config.features.dtype].bits // 8 + 8
    return (len(context.pool.unique()) + len(context.wanted.unique())) * each * len(_warm_up_to_come(context)[2])


def _warm_up_to_come(context: Context) -> tuple[tuple[int, int], int, list[int]]:
    """Tokens of the warm-up, in all and left; its rows (0: there is none); the steps at which gradients are taken."""
    config, pool = context.config, context.pool
    if config.checkpoints:
        return (0, 0), 0, [c.step for c in checkpoints.find(config.checkpoints)]
    recipe, rows = config.warmup, methods.warm_up_rows(context)
    steps = fit.planned_checkpoints(len(rows), recipe)
    folder = context.run.path("warmup")
    there = [step for step in steps if (folder / f"checkpoint-{step}" / checkpoint_files.COMPLETE).is_file()]
    tokens = int(pool.scan.tokens[rows].sum()) * recipe.epochs
    left = tokens - tokens * max(there, default=0) // steps[-1]
    return (tokens, left), len(rows), steps[-recipe.checkpoints :] if recipe.checkpoints else steps


def _stored(folder: Path) -> set[str]:
    """The keys whose features are in the store `folder` already."""
    if not (folder / "plan.json").is_file():
        return set()
    store = GradientFeatures.open(folder)
    missing = set(store.missing_units())
    return {key for unit in range(store.units) if unit not in missing for key in store.unit_keys(unit)}


def _dry_run(config: SelectConfig) -> Path:
    """Everything up to the first gradient, in a folder that is thrown away; says what the run would cost."""
    with files.scratch_folder() as scratch:
        inner = config.model_copy(update={"out": scratch / "run", "overwrite": False})
        with Run(inner.out, inner, "select") as current:
            context = _context(inner, current)
            _estimate(context)
            budget = Budget.parse(config.budget).resolve(methods.candidates(context.pool))
            asked = f"{budget.rows} rows" if budget.rows is not None else f"{budget.tokens} tokens"
            say(f"budget {config.budget}: {asked}")
            for reason, count in sorted(Counter(bad.reason for bad in context.pool.bad).items()):
                say(f"bad rows: {count} {reason}")
    say("dry run: nothing was written; the same command without --dry-run does it")
    return config.out


# ----------------------------------------------------------------------------------------------------------- choose


def choose(context: Context, scored: Scored) -> Selection:
    """The selection of this run's method, budget and caps."""
    config = context.config
    candidates = methods.candidates(context.pool, scored)
    options: dict[str, Any] = {"seed": derive_seed(config.seed, "selection"), "max_per_source": config.max_per_source}
    if config.method == "random":
        return select("random", candidates, config.budget, **options)
    if config.method == "random-length":
        return random_as_long_as(candidates, _target_lengths(context), config.budget, **options)
    if not scored.scores.isfinite().any():
        raise DataError("no row of the pool has a finite score; see the statuses in scores.parquet")
    return select("top_k", candidates, config.budget, **options)


def _target_lengths(context: Context) -> Sequence[int]:
    target = context.wanted
    return [int(n) for n in target.scan.supervised[target.usable]]


def random_as_long_as(candidates: Candidates, lengths: Sequence[int], budget: str, **options: Any) -> Selection:
    """Rows at random with answers as long as `lengths`, those of rows that need not be in the pool."""
    assert candidates.supervised is not None and candidates.tokens is not None
    n, m = len(candidates), len(lengths)
    # the selector matches rows of its own candidates, so the wanted lengths join as rows that nobody may take
    wider = Candidates(
        keys=[*candidates.keys, *(f"~{i}" for i in range(m))],
        sources=[*candidates.sources, *([""] * m)],
        tokens=torch.cat([candidates.tokens, torch.ones(m, dtype=torch.int64)]),
        supervised=torch.cat([candidates.supervised, torch.tensor(lengths, dtype=torch.int64)]),
        eligible=torch.cat([candidates.eligible, torch.zeros(m, dtype=torch.bool)]),
    )
    resolved = Budget.parse(budget).resolve(candidates)  # a share of the pool, not of the pool and the target
    asked = f"{resolved.rows}" if resolved.rows is not None else f"{resolved.tokens} tokens"
    return select("random_length", wider, asked, reference=Selection(torch.arange(n, n + m)), **options)


# ------------------------------------------------------------------------------------------------------------ write


def _write(context: Context, scored: Scored, selection: Selection, before: Mapping[str, Any]) -> dict[str, Any]:
    current, pool = context.run, context.pool
    chosen = [int(i) for i in selection.indices]
    why = _reasons(context, scored, selection)
    digest = verdicts.digest_of_lines(pool.pool.raw(index) for index in chosen)
    audit = verdicts.kept(current.folder, digest)
    verdicts.set_aside(current.folder, digest)
    with files.atomic_path(current.path(verdicts.SELECTED)) as path, open(path, "wb") as out:
        for index in chosen:
            out.write(pool.pool.raw(index) + b"\n")
    order = _ranking(pool, scored)
    _write_table(current.path("scores.parquet"), _score_columns(context, scored, chosen, order))
    _write_table(current.path("selected.parquet"), _selected_columns(context, scored, selection, order, why))
    current.provenance["selection"] = {
        "method": context.config.method,
        "rows": len(chosen),
        "keys_digest": files.digest("\n".join(pool.keys[i] for i in chosen).encode()),
    }
    summary = _summary(context, scored, selection, order, before)
    summary |= {"selection": {"digest": digest}, "audit": audit}
    summary = dict(redaction.hide_all(summary))
    files.write_json(current.path("summary.json"), summary)
    names = ("selected.jsonl", "selected.parquet", "scores.parquet", "summary.json")
    current.provenance["outputs"] = {name: files.digest_file(current.path(name)) for name in names}
    return summary


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    with files.atomic_path(path) as aside:
        pq.write_table(pa.table(dict(columns)), aside, compression="zstd")


def _ranking(pool: Rows, scored: Scored) -> dict[int, int]:
    """Row -> rank by score, 1 the best; rows without a score have none."""
    rows = [
        i
        for i in range(len(pool))
        if pool.status[i] == "ok" and i not in scored.status and math.isfinite(scored.scores[i])
    ]
    rows.sort(key=lambda i: (-float(scored.scores[i]), pool.keys[i], pool.pool.ids[i]))
    return {row: place for place, row in enumerate(rows, start=1)}


def _status(pool: Rows, scored: Scored, index: int) -> str:
    return scored.status.get(index, pool.status[index])


def _nearest(context: Context, scored: Scored, index: int) -> tuple[Row, float] | None:
    """The target row that this pool row is most similar to."""
    if scored.similarity is None or context.target is None or not scored.similarity[index].isfinite().all():
        return None
    best = int(scored.similarity[index].argmax())
    place = int(np.flatnonzero(context.target.usable)[best])
    return context.target.pool[place], float(scored.similarity[index, best])


def _score_columns(context: Context, scored: Scored, chosen: Sequence[int], order: Mapping[int, int]) -> dict[str, Any]:
    pool = context.pool
    n = len(pool)
    rows = range(n)
    taken, shown = set(chosen), cache(redaction.hide)
    columns: dict[str, Any] = {
        "_id": pa.array([pool.pool.ids[i] for i in rows], pa.string()),
        "_source": pa.array(pool.pool.sources, pa.string()),
        "_file": pa.array([shown(pool.pool.file(i)) for i in rows], pa.string()),
        "_line": pa.array([pool.pool.line(i) for i in rows], pa.int64()),
        "_key": pa.array(pool.keys, pa.string()),
        "_tokens": pa.array(pool.scan.tokens, pa.int32()),
        "_supervised": pa.array(pool.scan.supervised, pa.int32()),
        "_status": pa.array([_status(pool, scored, i) for i in rows], pa.string()),
        "_score": _floats(scored.scores),
        "_rank": pa.array([order.get(i) for i in rows], pa.int64()),
        "_selected": pa.array([i in taken for i in rows], pa.bool_()),
        "_norm": _floats(scored.norms) if scored.norms is not None else pa.nulls(n, pa.float32()),
    }
    nearest: list[str | None] = [None] * n
    similarities: list[float | None] = [None] * n
    if scored.similarity is not None and context.target is not None:
        usable = np.flatnonzero(context.target.usable)
        ids = [context.target.pool.ids[int(i)] for i in usable]
        good = scored.similarity.isfinite().all(1)
        best = scored.similarity.nan_to_num(-torch.inf).max(1)
        for i in good.nonzero().flatten().tolist():
            nearest[i], similarities[i] = ids[int(best.indices[i])], float(best.values[i])
    columns["_nearest"] = pa.array(nearest, pa.string())
    columns["_nearest_similarity"] = pa.array(similarities, pa.float32())
    return columns | {f"subtask:{name}": _floats(values) for name, values in scored.subtasks.items()}


def _floats(values: torch.Tensor) -> pa.Array:
    """float32 with null where there is no number."""
    return pa.array(values.numpy(), pa.float32(), mask=~values.isfinite().numpy())


def _selected_columns(
    context: Context, scored: Scored, selection: Selection, order: Mapping[int, int], why: Sequence[str]
) -> dict[str, Any]:
    """The rows' own columns as they were (nested ones as JSON where rows disagree on types), and ours."""
    pool = context.pool
    chosen = [int(i) for i in selection.indices]
    parsed = [json.loads(pool.pool.raw(i).decode("utf-8", "replace").removeprefix("\ufeff")) for i in chosen]
    held = Counter(name for value in parsed for name in value if not name.startswith("_"))
    columns: dict[str, Any] = {}
    common = {name for name, _ in held.most_common(MOST_COLUMNS)}
    for name in (name for name in held if name in common):
        columns[name] = column([value.get(name) for value in parsed])
    if len(held) > MOST_COLUMNS:  # names that are data: a column for each would be a table of nulls
        others = [{k: v for k, v in value.items() if k in held and k not in columns} for value in parsed]
        columns["_others"] = pa.array([json.dumps(other) for other in others], pa.string())
    return columns | {
        "_id": pa.array([pool.pool.ids[i] for i in chosen], pa.string()),
        "_source": pa.array([pool.pool.sources[i] for i in chosen], pa.string()),
        "_score": _floats(scored.scores[selection.indices]),
        "_rank": pa.array([order.get(i) for i in chosen], pa.int64()),
        "_weight": pa.array(selection.weights.numpy(), pa.float32()),
        "_why": pa.array(list(why), pa.string()),
    }


def _notes(config: SelectConfig, formula: Mapping[str, Any]) -> list[str]:
    """What a reader must know beside the formula."""
    notes = [f"update: {formula['settings']}"] if "settings" in formula else []
    if config.aggregate in ("round_robin", "bids") and config.method in NEED_TARGET:
        notes.append(f"aggregate={config.aggregate}: the score is a place in an order, 1 for the first, and no cosine")
    return notes


def _names(paths: Sequence[str]) -> str:
    """`gsm8k/dev.jsonl, ...`: the last two parts of the first path."""
    shown = "/".join(Path(paths[0]).parts[-2:])
    return shown if len(paths) == 1 else f"{shown} and {len(paths) - 1} more"


def column(values: Sequence[Any]) -> pa.Array:
    """JSON values as an Arrow column; as JSON text where they have no common type that parquet can hold."""
    if _fields(values) > MOST_COLUMNS:  # every row would have a place for the keys of all others
        return pa.array([None if v is None else json.dumps(v) for v in values], pa.string())
    try:
        found = pa.array(values)
        if not _hollow(found.type):
            return found
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return pa.array([None if v is None else json.dumps(v) for v in values], pa.string())


def _fields(values: Iterable[Any]) -> int:
    """How many fields an Arrow type of all of `values` has, at any depth: one for each place of a key."""
    known: set[tuple[str, ...]] = set()
    pending: list[tuple[tuple[str, ...], Any]] = [((), value) for value in values]
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                known.add((*place, key))
                pending.append(((*place, key), item))
        elif isinstance(value, list):
            pending += [(place, item) for item in value if isinstance(item, dict | list)]
    return len(known)


def _hollow(kind: pa.DataType) -> bool:
    """Whether an object without fields is somewhere inside, which parquet cannot write."""
    return (pa.types.is_struct(kind) and kind.num_fields == 0) or any(
        _hollow(kind.field(i).type) for i in range(kind.num_fields)
    )


def _reasons(context: Context, scored: Scored, selection: Selection) -> list[str]:
    """One sentence a chosen row."""
    reasons = []
    for place, index in enumerate(int(i) for i in selection.indices):
        near = _nearest(context, scored, index)
        if near is not None:
            reasons.append(f"most similar to target row {near[0].id} ({near[1]:.4f})")
        elif selection.why is not None:
            reasons.append(selection.why[place])
        else:
            reasons.append(f"score {float(scored.scores[index]):.6g}")
    return reasons


def _example(context: Context, scored: Scored, order: Mapping[int, int], index: int) -> dict[str, Any]:
    row = context.pool.pool[index]
    near = _nearest(context, scored, index)
    return {
        "rank": order[index],
        "score": float(scored.scores[index]),
        "source": row.source,
        "id": row.id,
        "where": context.pool.pool.where(index),
        "prompt": _short(row.question),
        "answer": _short(row.answer),
        "nearest": None
        if near is None
        else {
            "id": near[0].id,
            "similarity": near[1],
            "prompt": _short(near[0].question),
            "answer": _short(near[0].answer),
        },
    }


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _sources(pool: Rows, chosen: Sequence[int]) -> list[dict[str, Any]]:
    all_rows = Counter(pool.pool.sources[int(i)] for i in np.flatnonzero(pool.usable))
    taken = Counter(pool.pool.sources[i] for i in chosen)
    total = sum(all_rows.values())
    return [
        {
            "source": source,
            "pool_rows": count,
            "selected_rows": taken[source],
            "pool_share": count / total,
            "selected_share": taken[source] / max(1, len(chosen)),
        }
        for source, count in sorted(all_rows.items(), key=lambda item: (-item[1], item[0]))
    ]


def _bad_counts(rows: Rows) -> list[dict[str, Any]]:
    first: dict[str, str] = {}
    for bad in rows.bad:
        first.setdefault(bad.reason, f"{bad.file}:{bad.line}")
    counts = Counter(bad.reason for bad in rows.bad)
    return [{"reason": reason, "count": counts[reason], "example": where} for reason, where in sorted(first.items())]


def _warnings(context: Context, scored: Scored, chosen: Sequence[int]) -> list[str]:
    pool, found = context.pool, list(context.run.warnings)
    share = scored.coverage.get("seen_share", 1.0)
    if share < 0.5:
        found.append(
            f"only {share:.1%} of the trainable parameters are seen; features.method=loop sees all of them, slowly"
        )
    texts = Counter(pool.keys[i] for i in chosen)
    repeated = sum(count - 1 for count in texts.values())
    if repeated:
        found.append(f"{repeated} chosen rows repeat the content of another chosen row; --dedup exact leaves them out")
    dead = Counter(scored.status.values())
    found += [f"{count} rows have status {status} and were not scored" for status, count in sorted(dead.items())]
    if pool.scan.flags.get("control_token_in_text"):
        found.append(
            f"{pool.scan.flags['control_token_in_text']} rows hold the template's control tokens in their text"
        )
    return found


def _summary(
    context: Context, scored: Scored, selection: Selection, order: Mapping[int, int], before: Mapping[str, Any]
) -> dict[str, Any]:
    config, current, pool = context.config, context.run, context.pool
    chosen = [int(i) for i in selection.indices]
    ranked = list(order)
    target = context.target
    scored_text = dict(scored.formula)
    stages: list[dict[str, Any]] = [dict(stage) for stage in current.stages]
    names, groups = methods.subtask_groups(target) if target is not None else ([], torch.zeros(0, dtype=torch.int64))
    model: dict[str, Any] = {"name": config.model.name}
    if config.method not in ("random", "random-length", "tfidf"):
        loaded = context.model().model
        model["parameters"] = sum(p.numel() for p in loaded.parameters())
    return {
        "title": " from ".join(_names(paths) for paths in (config.target, config.train.paths) if paths),
        "command": command_line(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method,
        "formula": {
            "name": scored_text.get("name", config.method),
            "text": scored_text.get("text", ""),
            "notes": _notes(config, scored_text),
        },
        "model": model | scored.coverage,
        "warnings": _warnings(context, scored, chosen),
        "cost": {
            "before": dict(before),
            "after": {
                "rows": int(pool.usable.sum()),
                "tokens": max(0, round(scored.tokens - before.get("given", 0))),
                "seconds": current.seconds,
                "bytes": scored.feature_bytes,
                "peak_rss_bytes": peak_rss_bytes(),
            },
            "stages": stages,
        },
        "pool": {
            "rows": len(pool),
            "tokens": pool.tokens(),
            "supervised_tokens": int(pool.scan.supervised[pool.usable].sum()),
            "files": [{"path": f.path, "rows": f.rows, "bytes": f.bytes, "digest": f.digest} for f in pool.pool.files],
            "bad": _bad_counts(pool),
            "duplicates": len(pool.twins),
            "flags": {flag: pool.scan.flags[flag] for flag in sorted(pool.scan.flags)},
            "cut_tokens": int(pool.scan.cut.sum()),
            "cut_rows": int((pool.scan.cut > 0).sum()),
        },
        "target": None
        if target is None
        else {
            "rows": int(target.usable.sum()),
            "files": [
                {"path": f.path, "rows": f.rows, "bytes": f.bytes, "digest": f.digest} for f in target.pool.files
            ],
            "subtasks": [{"name": name, "rows": int((groups == i).sum())} for i, name in enumerate(names)],
        },
        "budget": {"asked": config.budget, "rows": len(chosen), "tokens": int(pool.scan.tokens[chosen].sum())},
        "sources": _sources(pool, chosen),
        "best": [_example(context, scored, order, i) for i in ranked[:EXAMPLES]],
        "worst": [_example(context, scored, order, i) for i in ranked[::-1][:EXAMPLES]],
        "checkpoints": scored.checkpoints,
        "seeds": {"seed": config.seed},
        "versions": versions(),
    }
