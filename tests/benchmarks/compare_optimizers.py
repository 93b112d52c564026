"""Every optimizer of the suite trains the same small Llama on the same text: final loss by learning rate and seed.

    python -m tests.benchmarks.compare_optimizers --text ../shared/data/corpus --out runs/compare
    python -m tests.benchmarks.compare_optimizers --text FOLDER --out runs/compare --optimizers adamw,lion --steps 50

`--text` is a folder with train.txt and valid.txt, read as bytes. Each run is a file in DIR/runs, so that a comparison
that was stopped goes on; DIR/results.json and DIR/report.html hold all. Same arguments, same machine: same losses.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from markupsafe import Markup
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

import optim
from datatools import files, keep_pages
from datatools.stats import t_interval
from optim import curvature
from pipelines.report import charts
from pipelines.runs.progress import progress
from pipelines.texts import number
from tests.conftest import REPOSITORY

MIDDLE = {
    "adabelief": 1e-2, "adahessian": 0.3, "adam_mini": 1e-3, "adamp": 3e-3, "adamw": 3e-3, "blockwise_adam": 3e-3,
    "exadam": 1e-3, "lion": 1.5e-3, "muon": 1.5e-2, "nadam": 3e-3, "sgd": 1.0, "sgd_sai": 3e-3, "sgdp": 1.0,
    "sophia_g": 1e-3, "sophia_h": 1e-3, "spam": 3e-3, "stable_spam": 3e-3, "conda": 1e-2, "normuon": 5e-2,
    "root": 1.5e-2, "scale": 3e-3, "sinkgd": 5e-2, "swan": 5e-2, "muon_8bit": 1.5e-2,
    "adamw_8bit": 3e-3, "lion_8bit": 1.5e-3, "galore": 1e-2, "fira": 1e-2, "apollo": 1e-2,
    "adafactor": 3e-2, "adagrad": 3e-2, "adam": 3e-3, "adam_atan2": 3e-3, "ademamix": 3e-3, "adopt": 3e-3,
    "came": 3e-3, "dion": 1.5e-2, "kron": 3e-3, "lamb": 1e-2, "lars": 10.0, "mars": 1e-2, "nadamw": 3e-3,
    "prodigy": 1.0, "rmnp": 1.5e-2, "rmsprop": 1e-3, "schedule_free_adamw": 1e-2, "schedule_free_sgd": 3.0,
    "shampoo": 1e-2, "signsgd": 1e-3, "soap": 1e-2, "stable_adamw": 3e-3,
}  # fmt: skip
"""The middle one of three learning rates, a factor of 3.16 apart. Where the best is at an end, up to `MORE` follow
beyond it; where it still is, the report says so. Not here: onebit_adam, which needs a process group, and in one process
is Adam whose second moment freezes after the warm-up.
"""

MORE = 2

BATCH, LENGTH = 8, 128  # windows a step, bytes a window
DECAY = 0.1

HYPER: dict[str, dict[str, Any]] = {
    "adam": {"weight_decay": 0.0},  # its decay is added to the gradient; the paper has none
    "sgd": {"momentum": 0.9},
    "sgdp": {"momentum": 0.9, "weight_decay": DECAY * (1 - 0.9)},  # its decay is multiplied by 1 / (1 - momentum)
}
"""Settings that are not the suite's defaults."""

CONSTANT = {"schedule_free_adamw", "schedule_free_sgd"}
"""Rules that average weights instead of decreasing the learning rate, as their paper says."""


@dataclass(frozen=True)
class Outcome:
    """One training run."""

    optimizer: str
    lr: float
    seed: int
    loss: float | None
    """Held-out nats a byte after the last step; None when training diverged."""
    curve: list[float]
    """Training loss of every tenth step."""
    step_seconds: float | None = None
    """CPU time of a step of the optimizer, on one thread: the median."""
    state_bytes: float | None = None
    """Bytes of the optimizer's state per parameter."""


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bytes_of(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """[starts, LENGTH] bytes as token ids."""
    return torch.stack([text[s : s + LENGTH] for s in starts.tolist()]).long()


def held_out(model: nn.Module, text: Tensor) -> float:
    """Mean loss of 128 evenly spaced windows."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, 128).long()
    model.eval()
    with torch.no_grad():
        parts = [float(model(input_ids=w, labels=w).loss) for w in windows(text, starts).split(BATCH)]
    return statistics.fmean(parts)


def train(name: str, lr: float, seed: int, texts: tuple[Tensor, Tensor], steps: int) -> Outcome:
    model = model_of(seed)
    settings = {"weight_decay": DECAY} | HYPER.get(name, {})
    optimizer = optim.create(name, list(model.named_parameters()), lr=lr, **settings)
    kind, floor = ("constant", {}) if name in CONSTANT else ("cosine", {"min_ratio": 0.1})
    factor = optim.schedule(kind, total_steps=steps, warmup_steps=steps // 10, **floor)
    scheduler = LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    seconds: list[float] = []
    model.train()
    for step in range(steps):
        batch = windows(texts[0], torch.randint(len(texts[0]) - LENGTH, (BATCH,), generator=generator))
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        refresh(optimizer, model, batch)
        begin = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - begin)
        scheduler.step()
        value = loss.item()
        if not math.isfinite(value):
            return Outcome(name, lr, seed, None, curve)
        if step % 10 == 0:
            curve.append(value)
    with optim.averages_in_place(optimizer):
        final = held_out(model, texts[1])
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    count = sum(p.numel() for p in model.parameters())
    loss = final if math.isfinite(final) else None
    return Outcome(name, lr, seed, loss, curve, statistics.median(seconds), held / count)


def refresh(optimizer: optim.Optimizer, model: nn.Module, batch: Tensor) -> None:
    curvature.refresh(optimizer, lambda: model(input_ids=batch, labels=batch).loss)


def rate(name: str, place: int) -> float:
    """The learning rate so many places from the middle."""
    return float(f"{MIDDLE[name] * 10 ** (place / 2):.2g}")


def searched(name: str, run: Callable[[float, range], Sequence[Outcome]], tune: int, seeds: int) -> Iterator[Outcome]:
    """The outcomes at three learning rates, and at up to `MORE` beyond the end at which the best one is.

    Learning rates are compared over `tune` seeds, and the best one then runs with all `seeds`.
    """
    means: dict[int, float] = {}
    wanted = [-1, 0, 1]
    while wanted:
        for place in wanted:
            found = run(rate(name, place), range(tune))
            yield from found
            means[place] = statistics.fmean(math.inf if o.loss is None else o.loss for o in found)
        best = min(means, key=means.__getitem__)
        beyond = best + 1 if best == max(means) else best - 1
        wanted = [beyond] if beyond not in means and len(means) < 3 + MORE else []
    yield from run(rate(name, best), range(tune, seeds))


# ---------------------------------------------------------------------------------------------------------- the report


def rows_of(outcomes: Sequence[Outcome], scale: charts.Scale) -> list[dict[str, Any]]:
    """One row an optimizer, best mean loss first; a learning rate at which a run diverged counts as the worst."""
    rows = []
    chosen: dict[str, dict[int, float]] = {}  # optimizer -> seed -> loss at its best learning rate
    for name in sorted({o.optimizer for o in outcomes}):
        mine = [o for o in outcomes if o.optimizer == name]
        losses: dict[float, dict[int, float | None]] = {}
        for o in mine:
            losses.setdefault(o.lr, {})[o.seed] = o.loss
        losses = dict(sorted(losses.items()))
        common = set.intersection(*(set(of) for of in losses.values()))
        finite = {lr: [x for x in of.values() if x is not None] for lr, of in losses.items()}
        means = {lr: _mean([of[seed] for seed in common]) for lr, of in losses.items()}
        best = min(means, key=means.__getitem__)
        means[best] = _mean(list(losses[best].values()))
        mean = means[best] if math.isfinite(means[best]) else None
        chosen[name] = {seed: x for seed, x in losses[best].items() if x is not None}
        timed = [o.step_seconds for o in mine if o.step_seconds is not None]
        held = next((o.state_bytes for o in mine if o.state_bytes is not None), None)
        rows.append(
            {
                "name": name,
                "best": means[best],
                "milliseconds": number(1000 * statistics.median(timed), 2) if timed else "",
                "bytes": "" if held is None else number(held, 1),
                "loss": "diverged" if mean is None else number(mean, 3),
                "seeds": ", ".join(number(x, 3) for x in finite[best]),
                "lr": f"{best:g}",
                "edge": best in (min(means), max(means)),
                "others": ", ".join(
                    f"{lr:g}: {'diverged' if math.isinf(value) else number(value, 3)}" for lr, value in means.items()
                ),
                "plot": charts.interval(
                    scale,
                    mean,
                    (min(finite[best]), max(finite[best])) if mean is not None else (None, None),
                    [x for found in finite.values() for x in found],
                    guide=None,
                    chosen=name == "adamw",
                    height=30,
                    label=f"{name}: held-out loss of {sum(map(len, finite.values()))} runs",
                ),
            }
        )
    for row in rows:
        row["against"], row["ahead"] = against(chosen[row["name"]], chosen.get("adamw", {}))
    return sorted(rows, key=lambda row: row["best"])


def _mean(losses: Sequence[float | None]) -> float:
    return statistics.fmean(math.inf if x is None else x for x in losses)


def against(own: dict[int, float], base: dict[int, float]) -> tuple[str, bool]:
    """The mean difference to AdamW over the seeds of both, with its 95 % interval; and whether the rule is ahead."""
    gaps = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    if not any(gaps):
        return "", False
    mean, low, high = t_interval(gaps)
    if low is None or high is None:
        return f"{mean:+.3f}", False
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", high < 0


PAGE = Path(__file__).with_suffix(".html")


def report(out: Path, outcomes: Sequence[Outcome], steps: int) -> None:
    finite = sorted(o.loss for o in outcomes if o.loss is not None)
    if not finite:
        raise SystemExit("every run diverged; choose smaller learning rates")
    scale = charts.Scale(math.floor(finite[0] * 20) / 20, min(finite[-1], finite[0] + 1.0))
    rows = rows_of(outcomes, scale)
    best = rows[0]
    seeds = len({o.seed for o in outcomes})
    extra = "".join(f"; {name} with {key} = {value:g}" for name, h in HYPER.items() for key, value in h.items())
    page = Environment(autoescape=True).from_string(PAGE.read_text())
    html = page.render(
        css=Markup((REPOSITORY / "pipelines/report/templates/report.css").read_text()),
        rows=rows, runs=len(outcomes), ticks=charts.ticks(scale), top=number(scale.high, 3), steps=steps, batch=BATCH,
        parameters=f"{sum(p.numel() for p in model_of(0).parameters()):,}", tokens=f"{steps * BATCH * LENGTH:,}",
        decay=DECAY, extra=extra,
        lead=f"Lowest held-out loss: {best['name']}, {best['loss']} nats a byte at learning rate {best['lr']}; "
        f"{seeds} seeds, three to {3 + MORE} learning rates each, {steps} steps.",
    )  # fmt: skip
    files.write_text(out / "report.html", html)
    files.write_json(out / "results.json", [asdict(o) for o in outcomes])
    heads = ("optimizer", "held-out loss", "each seed", "against AdamW", "learning rate", "ms a step", "bytes of state")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row in rows:
        rate = f"{row['lr']}{' (end)' if row['edge'] else ''}"
        keys = ("name", "loss", "seeds", "against", None, "milliseconds", "bytes")
        print(f"| {' | '.join(rate if key is None else row[key] for key in keys)} |")
    print(f"ahead of AdamW: {', '.join(row['name'] for row in rows if row['ahead']) or 'none'}")
    print(f"report: {out / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with train.txt and valid.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--optimizers", default=",".join(MIDDLE), help="names, by commas; all of them unless given")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", type=int, help="seeds at learning rates that are not the best; all unless given")
    options = parser.parse_args()
    names = options.optimizers.split(",")
    if unknown := [name for name in names if name not in MIDDLE]:
        parser.error(f"no learning rate is known for {unknown[0]!r}; one of {', '.join(MIDDLE)}")
    keep_pages()
    texts = bytes_of(options.text / "train.txt"), bytes_of(options.text / "valid.txt")
    outcomes: list[Outcome] = []

    def run(name: str, lr: float, seeds: range) -> list[Outcome]:
        found = []
        for seed in seeds:
            path = files.make_folder(options.out / "runs") / f"{name}-{lr:g}-{seed}-{options.steps}.json"
            if not path.is_file():
                files.write_json(path, asdict(train(name, lr, seed, texts, options.steps)))
            found.append(Outcome(**files.read_json(path)))
        return found

    with progress("training", len(names), "optimizers") as bar:
        for name in names:
            outcomes += searched(name, partial(run, name), options.tune or options.seeds, options.seeds)
            bar.advance(1)
    report(options.out, outcomes, options.steps)


if __name__ == "__main__":
    main()
