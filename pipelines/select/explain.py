"""`datatools explain RUN/selected.jsonl:17`: why a row was selected or not, its nearest target rows, and its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datatools import DataError, UsageError, files
from pipelines.models import load as models
from pipelines.report.page import damaged
from pipelines.report.values import mapping
from pipelines.rows.prepare import prepare, target_data
from pipelines.rows.rows import Rows
from pipelines.runs import run_files
from pipelines.runs.messages import say
from pipelines.select.scorer import Asked, scorer
from pipelines.settings import trust
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.load import load_config
from pipelines.settings.methods import Method, known
from pipelines.settings.select import SelectConfig
from pipelines.texts import visible

SHOWN_LAYERS = 8
SHOWN_TOKENS = 12
_STATUS = {
    "duplicate": "it repeats another row",
    "empty": "its gradient, or its loss, is zero",
    "nonfinite": "its loss or gradient is not finite",
    "too_long": "it is longer than the model takes",
}


def run(config: ExplainConfig) -> dict[str, Any]:
    """Print and return why a row was selected or not: its score, its rank, and its similarity to each target row.

    The similarities come from the function `nearest` of the method, applied to what the run has kept, and the layers
    that contribute to them from `layers`, if the method has it. LESS computes the shares of layers anew, without
    projection, at the checkpoint with the largest weight: the inner product of the row's update and the target row's
    gradient is a sum over parameters.

    Args:
        config: The settings.

    Raises:
        UsageError: The row or the run does not exist.
        DataError: The data of the run have changed.
    """
    folder = config.file.parent
    if not (folder / "run.yaml").is_file():
        raise UsageError(f"{config.file}: there is no run.yaml beside it; give selected.jsonl inside a run's folder")
    run_files.refuse_special(folder)
    if text := run_files.note(folder):
        say(text)
    allowed = config.trust_remote_code or None
    flags = {"out": folder, "model.trust_remote_code": allowed, "model.device": config.device}
    made_by = load_config(SelectConfig, folder / "run.yaml", flags, wanted=[trust.CODE])
    loaded = models.load(made_by.model, tokenizer_only=True)
    read: dict[str, Any] = {"cache": folder / "inputs", "limits": loaded.limits}
    pool = prepare(made_by.train, made_by.model, loaded.tokenizer, label="pool", **read)
    index = _chosen(config, pool, made_by) if config.row is None else row_named(config.row, pool)
    row = pool.pool[index]
    found: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "where": pool.pool.where(index),
        "method": made_by.method,
        "selector": made_by.selector,
        **row.shown(),
        **_placed(folder, pool, index),
        "targets": [],
        "layers": [],
        "tokens": [],
    }
    functions = scorer(made_by.method)
    kept = _kept(folder) if made_by.verify else ""
    candidate = functions.candidates().get(kept)
    method = known(made_by.method) if candidate is None else candidate.record
    found["candidate"] = kept
    asked: Asked | None = None
    shown = functions.nearest is not None or functions.tokens is not None
    if "target" in method.needs and shown and found["status"] == "ok":
        wanted = target_data(made_by.train, made_by.target, made_by.target_columns)
        target = prepare(wanted, made_by.model, loaded.tokenizer, label="target", **read)
        asked = Asked(made_by, folder, pool, target, index, kept)
        found["tokens"] = [] if functions.tokens is None else functions.tokens(asked)
    if functions.nearest is not None and asked is not None:
        rows = np.flatnonzero(target.usable).tolist()
        similarity = functions.nearest(asked)
        order = similarity.argsort(descending=True).tolist()[: config.nearest]
        for place in order:
            near = target.pool[rows[place]]
            found["targets"].append(
                {
                    "id": near.id,
                    "subtask": near.subtask,
                    "similarity": float(similarity[place]),
                    **near.shown(),
                }
            )
        found["layers"] = functions.layers(asked, [rows[place] for place in order])
    _show(found, method, Console())
    return found


# ------------------------------------------------------------------------------------------------------ finding a row


def _chosen(config: ExplainConfig, pool: Rows, made_by: SelectConfig) -> int:
    """Return the pool row at line `config.line` of the selection."""
    if not config.file.is_file():
        raise UsageError(f"{config.file}: no such file; the run in its folder has not selected yet")
    lines = files.read_bytes(config.file).removesuffix(b"\n").split(b"\n")
    if config.line > len(lines):
        raise UsageError(f"{config.file}:{config.line}: the file has {len(lines)} lines")
    index = next((i for i in range(len(pool)) if pool.pool.raw(i) == lines[config.line - 1]), None)
    if index is None:
        raise DataError(f"{config.file}:{config.line}: its row is no longer in {', '.join(made_by.train.paths)}")
    return index


def row_named(name: str, pool: Rows) -> int:
    """Return the pool row with a given name.

    Args:
        name: FILE:LINE of a file of the pool, or an id.
        pool: The pool.

    Raises:
        UsageError: There is no such row, or more than one.
        DataError: The row cannot be read.
    """
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
            raise DataError(f"{file}:{line}: never scored, because it cannot be read: {bad.reason} ({bad.detail})")
    raise UsageError(f"{file}:{line}: the pool has no such row")


def _kept(folder: Path) -> str:
    """Return the candidate whose scores a run with `verify` kept."""
    path = folder / "summary.json"
    if not path.is_file():
        raise UsageError(f"{folder}: there is no selection yet; run `datatools select` again with the same settings")
    with damaged(path, "run the same selection again to write it anew"):
        return str(mapping(mapping(files.read_json(path)).get("race")).get("kept") or "")


def _placed(folder: Path, pool: Rows, index: int) -> dict[str, Any]:
    """Return what scores.parquet says about the row (score, rank, selected or not), and the lowest chosen score."""
    path = folder / "scores.parquet"
    if not path.is_file():
        raise UsageError(f"{folder}: there are no scores yet; run `datatools select` again with the same settings")
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


def _show(found: dict[str, Any], method: Method, console: Console) -> None:
    console.print(Text(f"{visible(found['where'])}  {visible(found['source'])}  {visible(found['id'])}", style="bold"))
    console.print(Text(_short(found["prompt"], 400), style="dim"))
    console.print(Text(_short(found["answer"], 400)))
    console.print(Text(_why(found, method), style="" if found["selected"] else "yellow"))
    shape: dict[str, Any] = {"box": box.SIMPLE_HEAD, "min_width": min(80, console.width), "title_justify": "left"}
    if found["tokens"]:
        console.print(_gains(found["tokens"], shape))
    if not found["targets"]:
        return
    table = Table(title=f"{method.nearest} ({method.measure})", **shape)
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


def _gains(tokens: list[dict[str, Any]], shape: dict[str, Any]) -> Table:
    """Return a table of the tokens of the answer whose loss falls most, and their share of the whole drop."""
    order = sorted(tokens, key=lambda one: one["after"] - one["before"])[:SHOWN_TOKENS]
    whole = sum(one["before"] - one["after"] for one in tokens)
    title = f"tokens of the answer that gain most ({len(order)} of {len(tokens)}; all together {whole:+.4g})"
    table = Table(title=title, **shape)
    for name, side in (("token", "left"), ("loss before", "right"), ("after", "right"), ("drop", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for one in order:
        drop = one["before"] - one["after"]
        table.add_row(Text(visible(one["token"])), f"{one['before']:.4f}", f"{one['after']:.4f}", f"{drop:+.4g}")
    return table


def _why(found: dict[str, Any], record: Method) -> str:
    """Return one sentence: selected or not, by which method, and why."""
    method = found["method"] + (f" ({found['candidate']})" if found["candidate"] else "")
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
    if found["selector"] not in (None, record.selector):
        said += f". Rows were taken by --selector {found['selector']}, which may pass over better scores"
    if "target" not in record.needs:
        said += ". This method looks at no target rows, so no nearest ones are shown"
    return said


def _short(text: str, limit: int) -> str:
    shown = visible(text, keep="\n")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
