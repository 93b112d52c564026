"""Does choosing rows pay? Held-out loss against time and tokens, for every way to choose and for plain training.

    python -m tests.benchmarks.compare_coresets --data ../shared/data/train/mix-10k.jsonl --out runs/coresets
    python -m tests.benchmarks.compare_coresets --data FILE --model FOLDER --chat tulu --seconds 20 --rank 0 --out DIR

Every arm trains the same weights for the same time, choosing included, with one learning rate and a constant schedule,
so that every point of its curve is a result. Held-out rows, the same for all, are drawn evenly from every source, and
each source counts alike. Evaluations stop the clock. The clock is the CPU time of this process, which other processes
on the machine do not change; on a GPU, and with `--clock wall`, it is the time that passes.

Each run is a file in DIR/runs, so that a comparison that was stopped goes on; runs are done seed by seed.
DIR/results.json has all of them, and DIR/report.html the curves and the comparison at equal time and at equal tokens.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from datatools import CoLM, FeatureTable, files, small_sources
from pipelines.colm.coresets import Coresets, monitored
from pipelines.colm.given import arguments_of
from pipelines.models import load as models
from pipelines.models import losses
from pipelines.models.lora import add_lora
from pipelines.rows.prepare import prepare
from pipelines.rows.rows import Rows
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training import fit
from tests.benchmarks.coreset_curves import report

NEVER = 10**9
MEASURED = ("match_error", "match_error_random", "select_share", "known_share", "saved_seconds", "select_seconds")
GIVEN: dict[str, Any] = {"features": "stored", "refresh_every": NEVER}
EVEN: dict[str, Any] = {"weights": "uniform"}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        label: in tables.
        settings: of the coreset; None is plain training.
        large: train on as many rows as the others draw, in place of as many as they keep.
        table: what `stored` features are, measured before the clock starts, as those of a store are.
        target: whether the method needs target rows.
    """

    label: str
    settings: dict[str, Any] | None = None
    large: bool = False
    table: str = ""
    target: bool = False


ARMS: dict[str, Arm] = {
    "small": Arm("plain, small batches"),
    "large": Arm("plain, large batches", large=True),
    "random": Arm("random rows, small sources whole", {"method": "random_in_source"}),
    "random, even": Arm("random rows, each source by its share", {"method": "random_in_source", "small": []}),
    "exact": Arm("herding, exact (a pass each step)", {}),
    "early": Arm("herding, early gradients (part of a pass each step)", {"features": "early"}),
    "stored": Arm("herding, stored gradients", GIVEN | EVEN, table="gradients"),
    "stored, expectation": Arm("herding, stored gradients, weighted", GIVEN, table="gradients"),
    "stored, states": Arm("herding, stored hidden states", GIVEN | EVEN, table="states"),
    "measured once": Arm("herding, gradients measured once", GIVEN | EVEN),
    "stale": Arm("herding, stale gradients", {"features": "stale", **EVEN}),
    "stale, expectation": Arm("herding, stale gradients, weighted", {"features": "stale"}),
    "importance": Arm(
        "importance by stale losses", {"features": "stale", "method": "importance", "by_product": "loss"}
    ),
    "uds": Arm("UDS, stale logits", {"features": "stale", "method": "uds", **EVEN}),
    "uds, exact": Arm("UDS, a pass each step", {"method": "uds"}),
    "greats": Arm("GREATS, stale gradients", {"features": "stale", "method": "greats", **EVEN}, target=True),
    "partition_sel": Arm(
        "PartitionSel, stale gradients", {"features": "stale", "method": "partition_sel", **EVEN}, target=True
    ),
    "opus": Arm("OPUS, a pass each step", {"method": "opus"}, target=True),
}


class TimeIsUp(Exception):
    """The run has had its time."""


@dataclass
class Clock:
    """Time that can be stopped: of the CPU, or the time that passes."""

    read: Callable[[], float]
    total: float = 0.0
    started: float | None = None

    def go(self) -> None:
        self.started = self.read()

    def stop(self) -> float:
        if self.started is not None:
            self.total += self.read() - self.started
            self.started = None
        return self.total


@dataclass
class Curve:
    """Evaluates the model at `points` moments of the run, the clock stopped, and ends the run when time is up."""

    clock: Clock
    budget: float
    points: int
    lengths: Callable[[int], int]
    evaluate: Callable[[], dict[str, float]]
    found: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0

    def __call__(self, step: int, rows: Sequence[int]) -> None:
        seconds = self.clock.stop()
        if seconds >= self.budget * len(self.found) / self.points:
            self.found.append({"seconds": seconds, "tokens": self.tokens, "rows": self.rows, "steps": step - 1,
                               "sources": self.evaluate()})  # fmt: skip
        if seconds >= self.budget:
            raise TimeIsUp
        self.tokens += sum(self.lengths(row) for row in rows)
        self.rows += len(rows)
        self.clock.go()


def split(rows: Rows, each: int, seed: int, *, but: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """(rows to train on, held-out rows): up to `each` of every source, never more than a quarter of it."""
    generator = np.random.default_rng(seed)
    by_source: dict[str, list[int]] = {}
    for i in sorted(set(np.flatnonzero(rows.usable).tolist()) - set(but)):
        by_source.setdefault(rows.pool.sources[i], []).append(i)
    held: set[int] = set()
    for name in sorted(by_source):
        found = by_source[name]
        held |= set(generator.choice(found, min(each, len(found) // 4), replace=False).tolist())
    return [i for found in by_source.values() for i in found if i not in held], sorted(held)


def losses_by_source(module: Any, rows: Rows, held: Sequence[int]) -> dict[str, float]:
    """The mean loss of the held-out rows of each source."""
    found: dict[str, list[float]] = {}
    training = module.training
    module.eval()
    with torch.no_grad():
        for group, batch in rows.micro_batches(held, 8192, module.device):
            for i, loss in zip(group, losses.row_losses(module, batch).tolist(), strict=True):
                found.setdefault(rows.pool.sources[held[i]], []).append(loss)
    module.train(training)
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}


def table_of(kind: str, module: Any, rows: Rows, chosen: list[int], settings: CoresetConfig) -> FeatureTable:
    """What a store would hold of the rows: gradients of the last value projection, or mean hidden states."""
    colm = CoLM(module, losses.row_losses, keep=1, **arguments_of(settings))
    table = FeatureTable(chosen)
    for start in range(0, len(chosen), 256):
        part = chosen[start : start + 256]
        lengths = [int(rows.scan.tokens[row]) for row in part]
        batch = rows.batch(part, module.device)
        if kind == "gradients":
            table.put(part, colm.measured(batch, lengths), step=0)
            continue
        module.eval()
        with torch.no_grad():
            states = losses.last_states(module, batch["input_ids"]).float()
        means = torch.stack([states[i, :n].mean(0) for i, n in enumerate(lengths)])
        table.put(part, torch.nn.functional.normalize(means, dim=1), step=0)
    return table


def train(name: str, seed: int, rows: Rows, parts: dict[str, list[int]], o: argparse.Namespace) -> dict[str, Any]:
    """One run: its curve, and what its choices did and cost."""
    arm = ARMS[name]
    loaded = models.load(ModelConfig(name=o.model, chat=o.chat, max_length=o.max_length)).model
    module = loaded.requires_grad_(True)
    if o.rank:
        module = add_lora(loaded.requires_grad_(False), LoraConfig(rank=o.rank, alpha=2 * o.rank), seed=seed)
    large = o.keep if arm.settings is None and not arm.large else o.large
    # plain arms keep all they draw, and measure nothing, so that rows count alike in every arm
    own = {"keep": large, "monitor_every": NEVER} if arm.settings is None else {"keep": o.keep} | arm.settings
    choose = CoresetConfig(large_batch=large, **own)
    chosen = parts["train"]
    per_epoch = -(-len(chosen) // large)
    recipe = TrainingConfig(batch_size=large, epochs=-(-o.steps // per_epoch), max_steps=o.steps, learning_rate=o.lr,
                            schedule="constant", warmup_ratio=0.0, micro_tokens=o.micro_tokens)  # fmt: skip
    table = table_of(arm.table, module, rows, chosen, choose) if arm.table else None
    cuda = torch.cuda.is_available()
    clock = Clock(time.perf_counter if cuda or o.clock == "wall" else time.process_time)
    curve = Curve(clock, o.seconds, o.points, lambda row: int(rows.scan.tokens[row]),
                  lambda: losses_by_source(module, rows, parts["held"]))  # fmt: skip
    target = [rows.item(row) for row in parts["target"]] if arm.target else []
    choice = Coresets(choose, rows.pool.sources.__getitem__, table, target)
    history: list[dict[str, Any]] = []
    inner = choice.noted
    choice.noted = lambda log: (inner(log), history.__setitem__(slice(None), log))[0]  # type: ignore[method-assign]
    reduce = choice.reduce

    def reduced(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if clock.total == 0:  # the clock starts when the first rows are drawn: setting up a Trainer is not training
            clock.go()
        return reduce(batches)

    choice.reduce = reduced  # type: ignore[method-assign]
    with TemporaryDirectory() as scratch:
        with suppress(TimeIsUp):
            fit.fit(module, rows.item, chosen, recipe, Path(scratch), seed=seed, observe=curve, choose=choice)
    seen = monitored(history)
    means = {key: [e[key] for e in seen if key in e] for key in MEASURED}
    return {
        "arm": name,
        "seed": seed,
        "curve": curve.found,
        "says": next((e["costs_more"] for e in seen if "costs_more" in e), ""),
        **{key: float(np.median(values)) if values else None for key, values in means.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows with a column `dataset`")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chat", default="auto", help="auto, tulu, or a .jinja file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=";".join(ARMS), help=f"by semicolons, of: {'; '.join(ARMS)}")
    parser.add_argument("--seconds", type=float, default=120, help="time of each run, choosing included")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--points", type=int, default=8, help="evaluations of a run, besides that at its start")
    parser.add_argument("--steps", type=int, default=20_000, help="largest number of steps of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="the first of --seeds, which follow each other")
    parser.add_argument("--large", type=int, default=32)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--rows", type=int, default=None, help="train on this many rows at most, drawn evenly")
    parser.add_argument("--held-out", type=int, default=10, help="held-out rows of each source")
    parser.add_argument("--target", type=int, default=2, help="target rows of each source, for methods that need them")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8, help="of LoRA; 0 trains all weights")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-tokens", type=int, default=65_536, help="by default, a step is one pass")
    o = parser.parse_args()
    arms = [arm.strip() for arm in o.arms.split(";")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"no arm is called {unknown[0]!r}; known: {'; '.join(ARMS)}")
    config = ModelConfig(name=o.model, chat=o.chat, max_length=o.max_length)
    data = DataConfig(paths=[str(o.data)], on_bad_row="skip")
    tokenizer = models.load(config, tokenizer_only=True).tokenizer
    rows = prepare(data, config, tokenizer, cache=files.make_folder(o.out / "cache"), label="rows")
    rest, held = split(rows, o.held_out, seed=0)
    _, target = split(rows, o.target, seed=1, but=held)
    chosen = [row for row in rest if row not in set(target)]
    if o.rows is not None and o.rows < len(chosen):
        chosen = sorted(np.random.default_rng(2).choice(chosen, o.rows, replace=False).tolist())
    small = small_sources(Counter(rows.pool.sources[i] for i in chosen))
    parts = {"train": chosen, "held": held, "target": target}
    keys = ("seconds", "clock", "points", "steps", "large", "keep", "rows", "lr", "rank", "max_length", "held_out",
            "micro_tokens", "model", "chat", "data", "target")  # fmt: skip
    made_of = files.digest(repr([str(vars(o)[key]) for key in keys]).encode())[:12]
    runs = []
    # Seed by seed: a comparison that is stopped has every arm equally often.
    for seed in range(o.first_seed, o.first_seed + o.seeds):
        for arm in arms:
            path = (
                files.make_folder(o.out / "runs") / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{made_of}.json"
            )
            if not path.is_file():
                files.write_json(path, train(arm, seed, rows, parts, o))
            runs.append(files.read_json(path))
        report(runs, {name: arm.label for name, arm in ARMS.items()}, small, o)


if __name__ == "__main__":
    main()
