"""`datatools explain RUN/selected.jsonl:17`: why a row was chosen, or was not: the target rows and layers behind it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from datatools import DataError, GradientFeatures, UsageError, files, per_sample_grads
from optim import SGDRule
from pipelines.models import load as models
from pipelines.models.losses import losses_for, seen_parameters
from pipelines.report.page import damaged, visible
from pipelines.report.view import method_of
from pipelines.rows.prepare import prepare, target_data
from pipelines.rows.rows import Rows
from pipelines.runs import run_files
from pipelines.runs.messages import say
from pipelines.select import methods
from pipelines.settings import trust
from pipelines.settings.load import load_config
from pipelines.settings.select import NEED_TARGET, ExplainConfig, SelectConfig
from pipelines.training import checkpoints

_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
SHOWN_LAYERS = 8
_STATUS = {
    "duplicate": "it repeats another row",
    "empty": "its gradient is zero",
    "nonfinite": "its loss or gradient is not finite",
    "too_long": "it is longer than the model takes",
}


def run(config: ExplainConfig) -> dict[str, Any]:
    """Print, and return, why a row was chosen or not: its score and rank, and its similarity to each target row.

    For `less` also the exact share of each layer. Similarities are those of the run: of its stored features (less, rds)
    or of the words (tfidf). The layers' shares are computed anew, without projection, at the checkpoint with the
    largest weight: the inner product of the row's update and the target row's gradient is a sum over parameters, so it
    says which layers carry it.
    Raises: UsageError when the row or the run is not there; DataError when the run's data have changed.
    """
    folder = config.file.parent
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"{config.file}: there is no run.yaml beside it; give selected.jsonl inside a run's folder")
    run_files.refuse_special(folder)
    if text := run_files.note(folder):
        say(text)
    flags = {"out": folder, "model.trust_remote_code": config.trust_remote_code or None}
    made_by = load_config(SelectConfig, folder / "run.yaml", flags, wanted=[trust.CODE])
    loaded = models.load(made_by.model, tokenizer_only=True)
    read: dict[str, Any] = {"cache": folder / "inputs", "limits": loaded.limits}
    pool = prepare(made_by.train, made_by.model, loaded.tokenizer, label="pool", **read)
    index = _chosen(config, pool, made_by) if config.row is None else _named(config.row, pool)
    row = pool.pool[index]
    found: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "where": pool.pool.where(index),
        "method": made_by.method,
        "prompt": row.question,
        "answer": row.answer,
        **_placed(folder, pool, index),
        "targets": [],
        "layers": [],
    }
    if made_by.method in NEED_TARGET and found["status"] == "ok":
        wanted = target_data(made_by.train, made_by.target, made_by.target_columns)
        target = prepare(wanted, made_by.model, loaded.tokenizer, label="target", **read)
        stops = _stops(made_by, folder) if made_by.method == "less" else []
        rows = np.flatnonzero(target.usable).tolist()
        similarity = _similarity(made_by, folder, stops, pool, index, target)
        order = similarity.argsort(descending=True).tolist()[: config.nearest]
        for place in order:
            near = target.pool[rows[place]]
            found["targets"].append(
                {
                    "id": near.id,
                    "subtask": near.subtask,
                    "similarity": float(similarity[place]),
                    "prompt": near.question,
                    "answer": near.answer,
                }
            )
        if stops:
            heaviest = max(stops, key=lambda c: c.weight)
            found["layers"] = _layers(made_by, heaviest, pool, index, target, [rows[p] for p in order])
    _show(found, Console())
    return found


# -------------------------------------------------------------------------------------------------------------- the row


def _chosen(config: ExplainConfig, pool: Rows, made_by: SelectConfig) -> int:
    """The pool row that stands in line `config.line` of the selection."""
    if not config.file.is_file():
        raise UsageError(f"{config.file}: no such file; the run in its folder has not selected yet")
    lines = files.read_bytes(config.file).removesuffix(b"\n").split(b"\n")
    if config.line > len(lines):
        raise UsageError(f"{config.file}:{config.line}: the file has {len(lines)} lines")
    index = next((i for i in range(len(pool)) if pool.pool.raw(i) == lines[config.line - 1]), None)
    if index is None:
        raise DataError(f"{config.file}:{config.line}: its row is no longer in {', '.join(made_by.train.paths)}")
    return index


def _named(name: str, pool: Rows) -> int:
    """The pool row that `name` means: FILE:LINE of a file of the pool, or an id. Raises: UsageError."""
    file, _, line = name.rpartition(":")
    if file and line.isdecimal():
        for same in (
            lambda theirs: theirs == file,
            lambda theirs: Path(theirs).resolve() == Path(file).resolve(),
            lambda theirs: Path(theirs).name == file,
        ):
            names = [info.path for info in pool.pool.files if same(info.path)]
            if len(names) > 1:
                raise UsageError(
                    f"{name}: the pool has {len(names)} files of this name: {', '.join(names)}; give the whole path"
                )
            for theirs in names:
                return _at(theirs, int(line), pool)
    places = [i for i, identity in enumerate(pool.pool.ids) if identity == name]
    if len(places) > 1:
        raise UsageError(
            f"{name}: {len(places)} rows of the pool have this id; give one as FILE:LINE: "
            f"{', '.join(pool.pool.where(i) for i in places[:3])}"
        )
    if not places:
        shown = ", ".join(info.path for info in pool.pool.files[:3])
        raise UsageError(f"{name}: neither the id of a row of the pool nor FILE:LINE of one of its files ({shown})")
    return places[0]


def _at(file: str, line: int, pool: Rows) -> int:
    for i in range(len(pool)):
        if pool.pool.line(i) == line and pool.pool.file(i) == file:
            return i
    for bad in pool.bad:
        if bad.file == file and bad.line == line:
            raise DataError(f"{file}:{line}: never scored, for it cannot be read: {bad.reason} ({bad.detail})")
    raise UsageError(f"{file}:{line}: the pool has no such row")


def _placed(folder: Path, pool: Rows, index: int) -> dict[str, Any]:
    """What scores.parquet says about the row: score, rank, whether it was chosen, and where the selection ends."""
    path = folder / "scores.parquet"
    if not path.is_file():
        raise UsageError(f"{folder}: there are no scores yet; `datatools select` again with the same settings goes on")
    with damaged(path, "run the same selection again to write it anew"):
        table = pq.read_table(path, columns=["_id", "_key", "_line", "_status", "_score", "_rank", "_selected"])
        lines = np.asarray(table["_line"].to_numpy())
        key = pool.keys[index]
        for place in np.flatnonzero(lines == pool.pool.line(index)).tolist():
            if table["_key"][place].as_py() == key and table["_id"][place].as_py() == pool.pool.ids[index]:
                break
        else:
            raise DataError(
                f"{pool.pool.where(index)}: this row was not in the pool when {path} was written; run the same "
                "selection again to score it"
            )
        chosen = table.filter(table["_selected"])
        last = [score for score in chosen["_score"].to_pylist() if score is not None]
        return {
            "status": str(table["_status"][place].as_py()),
            "score": table["_score"][place].as_py(),
            "rank": table["_rank"][place].as_py(),
            "of": len(table) - table["_rank"].null_count,
            "selected": bool(table["_selected"][place].as_py()),
            "chosen_rows": len(chosen),
            "lowest_chosen": min(last, default=None),
        }


# ----------------------------------------------------------------------------------------------------- what it is like


def _stops(made_by: SelectConfig, folder: Path) -> list[checkpoints.Checkpoint]:
    """The checkpoints that count in the run's scores."""
    stops = checkpoints.find(made_by.checkpoints or [folder / "warmup"])
    if not made_by.checkpoints and made_by.warmup.checkpoints:
        stops = stops[-made_by.warmup.checkpoints :]
    return stops


def _similarity(
    made_by: SelectConfig, folder: Path, stops: list[checkpoints.Checkpoint], pool: Rows, index: int, target: Rows
) -> Tensor:
    """float32 [usable target rows]: of the row to each, as the run's method measures it."""
    wanted = np.flatnonzero(target.usable).tolist()
    if made_by.method == "tfidf":
        others = np.flatnonzero(pool.usable).tolist()
        return methods.word_similarity(pool, target)[others.index(index)]
    home = made_by.features.folder or folder / "features"
    names = [f"train-{stop.step}" for stop in stops] or ["hidden-pool"]
    if not all((home / name).is_dir() for name in names):
        raise DataError(f"{home}: the run's features are gone; run the same selection again to explain its picks")
    key, keys = pool.keys[index], [target.keys[i] for i in wanted]
    if made_by.method == "rds":
        hidden = GradientFeatures.open(home / "hidden-pool").take([key])[0]
        return GradientFeatures.open(home / "hidden-target").take(keys) @ hidden
    return _similarities(home, stops, key, keys)


def _similarities(home: Path, stops: list[checkpoints.Checkpoint], key: str, keys: list[str]) -> Tensor:
    total = sum(c.mean_lr for c in stops)
    similarity = torch.zeros(len(keys))
    for stop in stops:
        features = GradientFeatures.open(home / f"train-{stop.step}").take([key])[0]
        similarity += stop.mean_lr / total * (GradientFeatures.open(home / f"target-{stop.step}").take(keys) @ features)
    return similarity


def _layers(
    config: SelectConfig, stop: checkpoints.Checkpoint, pool: Rows, index: int, target: Rows, nearest: list[int]
) -> list[dict[str, Any]]:
    """Share of each layer in the mean cosine of the row's update with the nearest target rows' gradients."""
    base = models.load(config.model).model
    with checkpoints.at(stop, config.model, base) as module:
        params = checkpoints.trainable(module)
        state = checkpoints.updates(stop, params, adam_mode=config.features.adam_mode, module=module, base=base)
        trained = {name: p for name, p in module.named_parameters() if name in state.params}
        names = seen_parameters(module, trained, config.features.method)
        method: Any = config.features.method
        losses = losses_for(method)
        update = checkpoints.restrict(state, names).per_sample(
            per_sample_grads(losses, module, pool.batch([index], module.device), names, method=method)
        )
        plain = checkpoints.restrict(state, names, SGDRule())
        sums: dict[str, float] = defaultdict(float)
        length = torch.stack([u.square().sum() for u in update.values()]).sum().sqrt()
        for row in nearest:
            batch = target.batch([row], module.device)
            grads = plain.per_sample(per_sample_grads(losses, module, batch, names, method=method))
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            for name in names:
                sums[_layer(name)] += float((update[name] * grads[name]).sum() / (length * norm)) / len(nearest)
    return [{"layer": name, "cosine": value} for name, value in sorted(sums.items(), key=lambda item: -abs(item[1]))]


def _layer(name: str) -> str:
    """`layer 12 o_proj` for a parameter of block 12; the parameter's own name elsewhere."""
    found = _LAYER.search(name)
    module = re.sub(r"\.(lora_[AB]\.\w+\.)?(weight|bias)$", "", name).rsplit(".", 1)[-1]
    return f"layer {found[1]} {module}" if found else module


def _show(found: dict[str, Any], console: Console) -> None:
    console.print(Text(f"{visible(found['where'])}  {visible(found['source'])}  {visible(found['id'])}", style="bold"))
    console.print(Text(_short(found["prompt"], 400), style="dim"))
    console.print(Text(_short(found["answer"], 400)))
    console.print(Text(_why(found), style="" if found["selected"] else "yellow"))
    if not found["targets"]:
        return
    less = found["method"] == "less"
    what = "cosine, weighted over checkpoints" if less else f"cosine, {method_of({'method': found['method']})[0]}"
    title = "target rows it helps most" if less else "target rows that it is most like"
    shape: dict[str, Any] = {"box": box.SIMPLE_HEAD, "min_width": min(80, console.width), "title_justify": "left"}
    table = Table(title=f"{title} ({what})", **shape)
    table.add_column("cosine", justify="right")
    table.add_column("target row")
    table.add_column("text", ratio=1)
    for near in found["targets"]:
        table.add_row(f"{near['similarity']:+.4f}", Text(visible(near["id"])), Text(_short(near["prompt"], 120)))
    console.print(table)
    if not found["layers"]:
        return
    total = sum(layer["cosine"] for layer in found["layers"])
    title = f"layers that carry it (exact cosine with these rows: {total:+.4f})"
    table = Table(title=title, **shape)
    table.add_column("layer")
    table.add_column("part of the cosine", justify="right")
    for layer in found["layers"][:SHOWN_LAYERS]:
        table.add_row(layer["layer"], f"{layer['cosine']:+.4f}")
    if others := found["layers"][SHOWN_LAYERS:]:
        table.add_row(f"the other {len(others)}", f"{sum(layer['cosine'] for layer in others):+.4f}")
    console.print(table)


def _why(found: dict[str, Any]) -> str:
    """One sentence: chosen or not, by which method, and why."""
    method = found["method"]
    if found["status"] != "ok":
        reason = _STATUS.get(found["status"], found["status"])
        return f"not chosen, and never scored: {reason}"
    if found["score"] is None:  # random draws
        return f"{'chosen' if found['selected'] else 'not chosen'} at random (--method {method}): there is no reason"
    rank = f"score {found['score']:+.4g}, rank {found['rank']:,} of {found['of']:,}"
    if found["selected"]:
        said = f"chosen by --method {method}: {rank}"
    else:
        lowest = found["lowest_chosen"]
        last = f", the lowest chosen score is {lowest:+.4g}" if lowest is not None else ""
        said = f"not chosen by --method {method}: {rank}; {found['chosen_rows']:,} rows were chosen{last}"
    if method not in NEED_TARGET:
        said += ". This method looks at no target rows, so none stand behind it"
    return said


def _short(text: str, limit: int) -> str:
    shown = visible(text, keep="\n")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
