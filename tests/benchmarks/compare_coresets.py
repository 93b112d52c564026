"""Does choosing rows help training? Small batch, large batch, CoLM with each feature, herding, random by quotas.

    python -m tests.benchmarks.compare_coresets --data ../shared/data/train/mix-10k.jsonl --out runs/coresets
    python -m tests.benchmarks.compare_coresets --data FILE --model FOLDER --chat tulu --steps 40 --out FOLDER

Every arm trains fresh adapters on the same large batches in the same order for the same number of optimizer steps, each
row counting alike; held-out rows, the same for all, are drawn evenly from every source. Each run is a file in DIR/runs,
so that a comparison that was stopped goes on; DIR/results.json and DIR/report.html hold all.
"""

import argparse
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from datatools import files, small_sources, t_interval
from pipelines.colm.coresets import Coresets, monitored
from pipelines.models import load as models
from pipelines.models import losses
from pipelines.models.lora import add_lora
from pipelines.report import charts
from pipelines.rows.prepare import prepare
from pipelines.rows.rows import Rows
from pipelines.runs.progress import progress
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.texts import number
from pipelines.training import fit
from tests.conftest import REPOSITORY

MEDOIDS: dict[str, Any] = {"method": "facility_location"}
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "small": ("small batch", None),
    "large": ("large batch", None),
    "random, no sources kept": ("random rows, quotas for all sources", {"method": "random_in_source", "small": []}),
    "random": ("random rows, small sources kept", {"method": "random_in_source"}),
    "herding": ("herding, exact", {}),
    "herding, probes": ("herding, 16 probes", {"features": "probes", "probes": 16}),
    "medoids, exact": ("CoLM medoids, exact", MEDOIDS),
    "medoids, probes": ("CoLM medoids, 16 probes", MEDOIDS | {"features": "probes", "probes": 16}),
    "medoids, paper_code": ("CoLM as published", MEDOIDS | {"features": "paper_code"}),
}
CONTROL = "random"
PAGE = Path(__file__).with_suffix(".html")


def split(rows: Rows, each: int, seed: int) -> tuple[list[int], list[int]]:
    """(rows to train on, held-out rows): up to `each` of every source, never more than a quarter of it."""
    generator = np.random.default_rng(seed)
    by_source: dict[str, list[int]] = {}
    for i in np.flatnonzero(rows.usable).tolist():
        by_source.setdefault(rows.pool.sources[i], []).append(i)
    held: set[int] = set()
    for name in sorted(by_source):
        found = by_source[name]
        held |= set(generator.choice(found, min(each, len(found) // 4), replace=False).tolist())
    return [i for found in by_source.values() for i in found if i not in held], sorted(held)


def train(arm: str, seed: int, rows: Rows, chosen: list[int], held: list[int], o: argparse.Namespace) -> dict[str, Any]:
    """One training run: held-out loss by source, and what choosing did and cost."""
    config = ModelConfig(name=o.model, chat=o.chat, max_length=o.max_length)
    module = add_lora(models.load(config).model, LoraConfig(rank=o.rank, alpha=2 * o.rank), seed=seed)
    settings = ARMS[arm][1]
    large = o.keep if arm == "small" else o.large
    # the plain arms keep all they draw, so that rows count alike in every arm
    keep = large if settings is None else o.keep
    choose = CoresetConfig(keep=keep, large_batch=large, monitor_every=10, **(settings or {}))
    recipe = TrainingConfig(
        batch_size=large, epochs=math.ceil(o.steps * large / len(chosen)), max_steps=o.steps, learning_rate=o.lr,
        schedule="cosine", micro_tokens=o.micro_tokens,
    )  # fmt: skip
    started = perf_counter()
    with tempfile.TemporaryDirectory() as scratch, progress(f"{arm}, seed {seed}", o.steps, "steps") as bar:
        done = fit.fit(
            module, rows.item, chosen, recipe, Path(scratch), seed=seed, bar=bar,
            choose=Coresets(choose, rows.pool.sources.__getitem__),
        )  # fmt: skip
    seconds = perf_counter() - started
    by_source: dict[str, list[float]] = {}
    for row, loss in zip(held, row_losses(module, rows, held), strict=True):
        by_source.setdefault(rows.pool.sources[row], []).append(loss)
    seen = monitored(done.entries)
    return {
        "arm": arm,
        "seed": seed,
        "sources": {name: statistics.fmean(values) for name, values in sorted(by_source.items())},
        "seconds": seconds,
        "steps": done.steps,
        "match_error": statistics.fmean(e["match_error"] for e in seen),
        "match_error_random": statistics.fmean(e["match_error_random"] for e in seen),
        "select_seconds": statistics.median(e["select_seconds"] for e in seen),
        "train_seconds": statistics.median(e["train_seconds"] for e in seen),
    }


def row_losses(module: Any, rows: Rows, held: Sequence[int]) -> list[float]:
    import torch

    with torch.inference_mode():
        return [float(losses.row_losses(module, rows.batch([row], module.device))[0]) for row in held]


# ---------------------------------------------------------------------------------------------------------- the report


def means(run: dict[str, Any], small: frozenset[str]) -> tuple[float, float, float]:
    """Mean loss over sources, over small ones, over large ones: each source counts alike."""
    found = run["sources"]
    return (
        statistics.fmean(found.values()),
        statistics.fmean([v for k, v in found.items() if k in small] or [math.nan]),
        statistics.fmean([v for k, v in found.items() if k not in small] or [math.nan]),
    )


def rows_of(runs: Sequence[dict[str, Any]], small: frozenset[str]) -> tuple[list[dict[str, Any]], charts.Scale]:
    """One row an arm: losses over seeds, and the paired difference from random rows with the same sources kept."""
    control = {run["seed"]: means(run, small)[0] for run in runs if run["arm"] == CONTROL}
    whole = [means(run, small)[0] for run in runs]
    scale = charts.Scale(math.floor(min(whole) * 50) / 50, math.ceil(max(whole) * 50) / 50)
    found = []
    for arm, (label, settings) in ARMS.items():
        own = [run for run in runs if run["arm"] == arm]
        if not own:
            continue
        losses = [means(run, small) for run in own]
        mean, low, high = t_interval([loss[0] for loss in losses])
        paired = [means(run, small)[0] - control[run["seed"]] for run in own if run["seed"] in control]
        gap, left, right = t_interval(paired) if paired else (0.0, None, None)
        verdict = "" if arm == CONTROL or left is None or right is None else (
            "better" if right < 0 else "worse" if left > 0 else "no difference seen"
        )  # fmt: skip
        found.append({
            "arm": arm, "label": label, "loss": number(mean, 4),
            "seeds": ", ".join(number(loss[0], 4) for loss in losses),
            "small": number(statistics.fmean(loss[1] for loss in losses), 4),
            "large": number(statistics.fmean(loss[2] for loss in losses), 4),
            "gap": "" if arm == CONTROL else number(gap),
            "between": "" if arm == CONTROL or left is None else f"{number(left)} to {number(right)}",
            "verdict": verdict,
            "error": number(statistics.fmean(run["match_error"] for run in own)) if settings is not None else "",
            "error_random":
                number(statistics.fmean(run["match_error_random"] for run in own)) if settings is not None else "",
            "seconds": number(statistics.fmean(run["seconds"] / run["steps"] for run in own)),
            "plot": charts.interval(scale, mean, (low, high), [loss[0] for loss in losses], guide=None,
                                    chosen=settings is not None, label=f"{label}: held-out loss", height=30),
        })  # fmt: skip
    return found, scale


def lead(rows: Sequence[dict[str, Any]]) -> str:
    """What the comparison shows, in plain words."""
    chosen = [r for r in rows if r["arm"] not in ("small", "large", CONTROL, "random, no sources kept")]
    better = [r["label"] for r in chosen if r["verdict"] == "better"]
    worse = [r["label"] for r in chosen if r["verdict"] == "worse"]
    parts = []
    if not any(r["verdict"] for r in chosen):
        parts.append("Too few runs to tell any choice from random rows of the same sources")
    elif better:
        parts.append(f"Lower held-out loss than random rows of the same sources: {', '.join(better)}")
    else:
        parts.append("No choice of rows has a lower held-out loss than random rows of the same sources")
    if worse:
        parts.append(f"higher: {', '.join(worse)}")
    plain = next((r for r in rows if r["arm"] == "random, no sources kept"), None)
    if plain is not None and plain["verdict"]:
        against = {"worse": "keeping small sources whole lowers it", "better": "keeping small sources whole raises it"}
        parts.append(against.get(plain["verdict"], "keeping small sources whole makes no difference that is seen"))
    return "; ".join(parts) + "."


def report(runs: Sequence[dict[str, Any]], small: frozenset[str], o: argparse.Namespace) -> None:
    rows, scale = rows_of(runs, small)
    names = sorted({name for run in runs for name in run["sources"]})
    by_arm = {r["arm"]: [run for run in runs if run["arm"] == r["arm"]] for r in rows}
    table = [
        {"name": name, "small": name in small,
         "losses": [number(statistics.fmean(run["sources"][name] for run in own), 4) for own in by_arm.values()]}
        for name in names
    ]  # fmt: skip
    page = Environment(autoescape=True).from_string(PAGE.read_text())
    html = page.render(
        css=Markup((REPOSITORY / "pipelines/templates/report.css").read_text()), rows=rows, lead=lead(rows),
        table=table,
        ticks=charts.ticks(scale), seeds=len({run["seed"] for run in runs}), o=vars(o), model=Path(o.model).name,
    )  # fmt: skip
    files.write_text(o.out / "report.html", html)
    files.write_json(o.out / "results.json", list(runs))
    heads = ("arm", "held-out loss", "small sources", "large", "against random", "95 %", "", "match error", "of random",
             "s a step")  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        keys = ("label", "loss", "small", "large", "gap", "between", "verdict", "error", "error_random", "seconds")
        print(f"| {' | '.join(str(r[key]) for key in keys)} |")
    print(f"{lead(rows)}\nreport: {o.out / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows with a column `dataset`")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chat", default="auto", help="auto, tulu, or a .jinja file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=";".join(ARMS), help=f"by semicolons, of: {'; '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", type=int, default=32)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=10, help="held-out rows of each source")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    o = parser.parse_args()
    arms = [arm.strip() for arm in o.arms.split(";")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"no arm is called {unknown[0]!r}; known: {'; '.join(ARMS)}")
    config = ModelConfig(name=o.model, chat=o.chat, max_length=o.max_length)
    data = DataConfig(paths=[str(o.data)], on_bad_row="skip")
    tokenizer = models.load(config, tokenizer_only=True).tokenizer
    rows = prepare(data, config, tokenizer, cache=files.make_folder(o.out / "cache"), label="rows")
    chosen, held = split(rows, o.held_out, seed=0)
    small = small_sources(Counter(rows.pool.sources[i] for i in chosen))
    keys = ("steps", "large", "keep", "lr", "rank", "max_length", "held_out", "model", "chat", "data")
    made_of = files.digest(repr([str(vars(o)[key]) for key in keys]).encode())[:12]
    runs = []
    for seed in range(o.seeds):  # seed by seed: a comparison that is stopped has every arm equally often
        for arm in arms:
            name = arm.replace(", ", "-").replace(" ", "-")
            path = files.make_folder(o.out / "runs") / f"{name}-{seed}-{made_of}.json"
            if not path.is_file():
                files.write_json(path, train(arm, seed, rows, chosen, held, o))
            runs.append(files.read_json(path))
        report(runs, small, o)


if __name__ == "__main__":
    main()
