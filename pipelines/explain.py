"""`datatools explain RUN/selected.jsonl:17`: the target rows and the layers behind one pick."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from datatools import DataError, GradientFeatures, UsageError, files, per_sample_grads
from optim import SGDRule
from pipelines import checkpoints, models
from pipelines.config import ExplainConfig, SelectConfig
from pipelines.config_files import load_config
from pipelines.prepare import Rows, prepare, target_data
from pipelines.report import visible

_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")
SHOWN_LAYERS = 8


def run(config: ExplainConfig) -> dict[str, Any]:
    """Print, and return, why a row was chosen: similarity to each target row, and the exact share of each layer.

    Similarities are read from the run's stored features. The layers' shares are computed anew, without projection, at
    the checkpoint with the largest weight: the inner product of the row's update and the target row's gradient is a sum
    over parameters, so it says which layers carry it.
    Raises: UsageError when the line or the run is not there; DataError when the run's data have changed.
    """
    folder = config.file.parent
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"{config.file}: there is no run.yaml beside it; give selected.jsonl inside a run's folder")
    made_by = load_config(SelectConfig, folder / "run.yaml", {"out": folder}, [])
    lines = files.read_bytes(config.file).removesuffix(b"\n").split(b"\n")
    if config.line > len(lines):
        raise UsageError(f"{config.file}:{config.line}: the file has {len(lines)} lines")
    loaded = models.load(made_by.model, tokenizer_only=True)
    read: dict[str, Any] = {"cache": folder / "inputs", "limits": loaded.limits}
    pool = prepare(made_by.train, made_by.model, loaded.tokenizer, label="pool", **read)
    index = next((i for i in range(len(pool)) if pool.pool.raw(i) == lines[config.line - 1]), None)
    if index is None:
        raise DataError(f"{config.file}:{config.line}: its row is no longer in {', '.join(made_by.train.paths)}")
    row = pool.pool[index]
    found: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "where": pool.pool.where(index),
        "method": made_by.method,
        "prompt": row.question,
        "answer": row.answer,
        "targets": [],
        "layers": [],
    }
    if made_by.method == "less":
        wanted = target_data(made_by.train, made_by.target, made_by.target_columns)
        target = prepare(wanted, made_by.model, loaded.tokenizer, label="target", **read)
        home = made_by.features.folder or folder / "features"
        stops = checkpoints.find(made_by.checkpoints or [folder / "warmup"])
        if not made_by.checkpoints and made_by.warmup.checkpoints:
            stops = stops[-made_by.warmup.checkpoints :]
        if not all((home / f"train-{c.step}").is_dir() for c in stops):
            raise DataError(f"{home}: the run's features are gone; run it again to explain its picks")
        rows = np.flatnonzero(target.usable).tolist()
        similarity = _similarities(home, stops, pool.keys[index], [target.keys[i] for i in rows])
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
        found["layers"] = _layers(
            made_by, max(stops, key=lambda c: c.weight), pool, index, target, [rows[p] for p in order]
        )
    _show(found, Console())
    return found


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
        names = models.seen_parameters(module, trained, config.features.method)
        method: Any = config.features.method
        losses = models.losses_for(method)
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
    if not found["targets"]:
        console.print(f"chosen by --method {found['method']}: no target rows or layers stand behind it")
        return
    table = Table(box=box.SIMPLE_HEAD, title="target rows it helps most (cosine, weighted over checkpoints)")
    table.add_column("cosine", justify="right")
    table.add_column("target row")
    table.add_column("text", ratio=1)
    for near in found["targets"]:
        table.add_row(f"{near['similarity']:+.4f}", Text(visible(near["id"])), Text(_short(near["prompt"], 120)))
    console.print(table)
    total = sum(layer["cosine"] for layer in found["layers"])
    table = Table(box=box.SIMPLE_HEAD, title=f"layers that carry it (exact cosine with these rows: {total:+.4f})")
    table.add_column("layer")
    table.add_column("part of the cosine", justify="right")
    for layer in found["layers"][:SHOWN_LAYERS]:
        table.add_row(layer["layer"], f"{layer['cosine']:+.4f}")
    rest = sum(layer["cosine"] for layer in found["layers"][SHOWN_LAYERS:])
    table.add_row(f"the other {max(0, len(found['layers']) - SHOWN_LAYERS)}", f"{rest:+.4f}")
    console.print(table)


def _short(text: str, limit: int) -> str:
    shown = visible(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
