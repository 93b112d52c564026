"""Does an order that the tool finds train a better model than a random one? Held-out loss and accuracy over seeds.

    python -m tests.benchmarks.compare_orders --model ../shared/data/models/stories260k --chat tulu --out DIR
    python -m tests.benchmarks.compare_orders --model FOLDER --cases mix-1k --seeds 3 --rate 1e-4 --out DIR
    python -m tests.benchmarks.compare_orders --show --out tests/benchmarks/results/orders

A case is `corpus` (pretraining on plain text, batches from one part of the books) or `mix-1k` (instructions, batches of
one source). A seed draws other rows, another warm-up and other random orders. The tool sees only `dev`, rows that are
held out for its estimates and choices; every order is judged on `test`, other rows of the same kind, which nothing has
seen. The arms of a seed train from one start on the same batches, so that differences between them are paired.

Each training run is a file in DIR/CASE-SEED, so that a comparison that was stopped goes on. DIR/results.json has all
of them. Needs ../shared/data (or DATATOOLS_SHARED).
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from datatools import Order, files, order, t_interval
from pipelines.order import setting as order_setting
from pipelines.order.curricula import run_curricula
from pipelines.order.estimate import surrogate
from pipelines.order.kept import start
from pipelines.order.scores import measured
from pipelines.order.search import search
from pipelines.order.setting import Setting
from pipelines.runs.folder import Run
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import ModelConfig
from tests.benchmarks.order import SHARED

CURRICULA = {
    "length, rising": ("length", "sort"), "length, falling": ("length", "reverse"),
    "loss, rising": ("loss", "sort"), "loss, falling": ("loss", "reverse"), "loss, saw": ("loss", "saw"),
}  # fmt: skip
"""Arm -> the score and the shape of its order."""

FOUND = ("order curricula", "order search")
"""The arms whose order the tool chooses."""

RANDOM, BEST = "random", "random, best on dev"
PARTS = 7  # of the text, each a source
ROWS = 1_000  # of text to train on, evenly spaced
CHARACTERS = 240  # of a row of text, at most
TURNS = 30  # tokens that a chat template adds before the answer, at most


@dataclass(frozen=True)
class Files:
    """The rows of a case: to train on, held out for the tool, and held out from it."""

    train: Path
    dev: Path
    test: Path


def texts(path: Path) -> Iterator[str]:
    """The text of a file in pieces of whole words, each at most `CHARACTERS` long; words are shorter than that."""
    held = ""
    for word in path.read_text().split():
        if len(held) + len(word) >= CHARACTERS:
            yield held
            held = ""
        held += (" " if held else "") + word


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus(folder: Path, held: int, longest: int) -> Files:
    """Rows of plain text; dev and test take turns through the validation text."""
    made = list(texts(SHARED / "data" / "corpus" / "train.txt"))
    rows = [
        {"text": made[i], "id": f"train-{i}", "dataset": f"part {PARTS * i // len(made) + 1}"}
        for i in (len(made) * place // ROWS for place in range(ROWS))
    ]
    valid = [{"text": text, "id": f"valid-{i}"} for i, text in enumerate(texts(SHARED / "data/corpus/valid.txt"))]
    spread = [valid[len(valid) * i // (2 * held)] for i in range(2 * held)]
    return Files(
        write(folder / "train.jsonl", rows), write(folder / "dev.jsonl", spread[::2]),
        write(folder / "test.jsonl", spread[1::2]),
    )  # fmt: skip


def mix(folder: Path, held: int, longest: int) -> Files:
    """Rows of mix-1k; dev and test are rows of mix-10k that are not in it, with prompts that surely fit."""
    train = SHARED / "data" / "train" / "mix-1k.jsonl"
    known = {json.loads(line)["id"] for line in train.read_text().splitlines()}
    large = map(json.loads, train.with_name("mix-10k.jsonl").read_text().splitlines())
    others = [row for row in large if row["id"] not in known and len(row["messages"][0]["content"]) + TURNS <= longest]
    drawn = [others[i] for i in np.random.default_rng(0).permutation(len(others))[: 2 * held]]
    return Files(train, write(folder / "dev.jsonl", drawn[:held]), write(folder / "test.jsonl", drawn[held:]))


CASES = {"corpus": corpus, "mix-1k": mix}


def config_of(options: argparse.Namespace, case: Files, seed: int, held: Path, out: Path) -> OrderConfig:
    """The settings of one seed of a case, with one of its held-out files."""
    return OrderConfig(
        task="search",
        model=ModelConfig(name=options.model, chat=options.chat, max_length=options.max_length),
        data=OrderData(paths=[str(case.train)]),
        validation=[str(held)],
        out=out,
        overwrite=True,
        seed=seed,
        training=OrderTraining(
            learning_rate=options.rate, batch_size=options.batch_size, optimizer=options.optimizer,
            schedule=options.schedule,
        ),
        batches=options.batches,
        warmup_steps=options.warmup_steps,
        estimators=options.estimators.split(","),
        judged=options.judged,
        sample_rows=options.sample_rows,
        retrain=0,
        grouping="source",
        worth=0,
    )  # fmt: skip


def built(config: OrderConfig) -> Setting:
    """The batches and the start of a run, as `datatools order` makes them."""
    with Run(config.out, config, "order", overwrite=True) as current:
        return order_setting.build(config, current)


def proposed(setting: Setting) -> dict[str, tuple[list[int], float]]:
    """Arm -> the order that the tool proposes, and what finding it cost in retrainings, everything included."""
    made: dict[str, tuple[list[int], float]] = {}

    def spent() -> float:
        return setting.problem.cost.in_gradients(hvp=order.HVP_IN_GRADIENTS) / len(setting.sequence)

    for name in setting.config.estimators:
        surrogate(setting, name)
    shared = spent()
    for arm, task in zip(FOUND, (run_curricula, search), strict=True):
        before = spent()
        task(setting)
        made[arm] = list(Order.load(setting.run.path("order.npz")).sequence), shared + spent() - before
    return made


def judged(setting: Setting, params: order.Params) -> tuple[float, float]:
    """Mean loss of the held-out tokens, and the share of them that the model gives the highest probability."""
    loss, right, total = 0.0, 0, 0
    with torch.no_grad():
        for _, part in (one for batch in setting.problem.validation for one in batch):
            inputs = {key: tensor for key, tensor in part.items() if key != "labels"}
            logits = torch.func.functional_call(setting.module, params, (), inputs | {"use_cache": False}).logits
            labels = part["labels"][:, 1:]
            wanted = labels != -100
            chosen, right_ones = logits[:, :-1][wanted].float(), labels[wanted]
            loss += float(functional.cross_entropy(chosen, right_ones, reduction="sum"))
            right += int((chosen.argmax(-1) == right_ones).sum())
            total += len(right_ones)
    return loss / total, right / total


def one_seed(options: argparse.Namespace, name: str, seed: int) -> list[dict[str, Any]]:
    """Train all arms of one seed; what is there is kept."""
    folder = files.make_folder(Path(options.out) / f"{name}-{seed}")
    case = CASES[name](folder, options.held_out, options.max_length)
    kept = {path.stem: files.read_json(path) for path in folder.glob("arm-*.json")}
    wanted = [*FOUND, *CURRICULA, *(f"{RANDOM} {i + 1}" for i in range(options.orders))]
    if all(_stem(arm) in kept for arm in wanted):
        return [kept[_stem(arm)] for arm in wanted]
    setting = built(config_of(options, case, seed, case.dev, folder / "dev"))
    judge = built(config_of(options, case, seed, case.test, folder / "test"))
    assert setting.plan.batches == judge.plan.batches, "the batches do not depend on the held-out rows"
    asked = {arm: (one, 0.0) for arm, one in _plain(setting, options.orders).items()}
    if not all(_stem(arm) in kept for arm in FOUND):
        for arm, (sequence, cost) in proposed(setting).items():
            kept[_stem(arm)] = _trained(setting, judge, name, seed, arm, sequence, cost, folder)
    for arm, (sequence, cost) in asked.items():
        if _stem(arm) not in kept:
            kept[_stem(arm)] = _trained(setting, judge, name, seed, arm, sequence, cost, folder)
    return [kept[_stem(arm)] for arm in wanted]


def _stem(arm: str) -> str:
    return "arm-" + arm.replace(", ", "-").replace(" ", "-")


def _plain(setting: Setting, orders: int) -> dict[str, list[int]]:
    """The orders that cost nothing to find."""
    made: dict[str, list[int]] = {}
    scores = measured(setting, sorted({score for score, _ in CURRICULA.values()}))
    for arm, (score, shape) in CURRICULA.items():
        places = order.arrange([scores[score][batch] for batch in setting.sequence], shape)
        made[arm] = [setting.sequence[place] for place in places]
    for i, sequence in enumerate(setting.random_orders("compare", orders)):
        made[f"{RANDOM} {i + 1}"] = list(sequence)
    return made


def _trained(
    setting: Setting, judge: Setting, case: str, seed: int, arm: str, sequence: list[int], cost: float, folder: Path
) -> dict[str, Any]:
    begin = start(setting)
    end, _ = order.train(setting.problem, setting.recipe, sequence, begin.params, begin.states)
    loss, right = judged(judge, end)
    found = {
        "case": case, "seed": seed, "arm": arm, "dev": setting.problem.held_out_loss(end),
        "test": loss, "accuracy": right, "retrainings": cost, "sequence": sequence,
    }  # fmt: skip
    files.write_json(folder / f"{_stem(arm)}.json", found)
    print(f"{case} {seed} {arm}: dev {found['dev']:.4f}, test {found['test']:.4f}", flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------- the table


def of_seed(runs: Sequence[Mapping[str, Any]], arm: str, key: str) -> float:
    """A number of one seed: of an arm, of the mean over random orders, or of the one that is best on dev."""
    drawn = [run for run in runs if run["arm"].startswith(f"{RANDOM} ")]
    if arm == RANDOM:
        return statistics.fmean(run[key] for run in drawn)
    if arm == BEST:
        return float(min(drawn, key=lambda run: run["dev"])[key]) if key != "retrainings" else float(len(drawn))
    return float(next(run for run in runs if run["arm"] == arm)[key])


def table(runs: Sequence[Mapping[str, Any]], case: str) -> list[str]:
    """Markdown rows of a case: means over seeds, and paired differences with 95 % intervals of Student's t."""
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["case"] == case:
            by_seed.setdefault(run["seed"], []).append(run)
    lines = [
        f"| {case}, {len(by_seed)} seeds | test loss | against random orders | against the best random | accuracy "
        "| retrainings to find |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in (*FOUND, *CURRICULA, RANDOM, BEST):
        mean = {
            key: statistics.fmean(of_seed(one, arm, key) for one in by_seed.values())
            for key in ("test", "accuracy", "retrainings")
        }
        gaps = []
        for other in (RANDOM, BEST):
            values = [of_seed(one, arm, "test") - of_seed(one, other, "test") for one in by_seed.values()]
            gap, low, high = t_interval(values)
            bars = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
            gaps.append("" if arm == other else f"{gap:+.4f}{bars}")
        lines.append(
            f"| {arm} | {mean['test']:.4f} | {gaps[0]} | {gaps[1]} | {mean['accuracy']:.4f} "
            f"| {mean['retrainings']:.1f} |"
        )
    return lines


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--chat", default="auto")
    parser.add_argument("--out", required=True)
    parser.add_argument("--cases", default="corpus,mix-1k")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--estimators", default="span")
    parser.add_argument("--show", action="store_true", help="print the tables of the results in --out; train nothing")
    for name, value in {
        "seeds": 5, "batches": 16, "batch-size": 4, "max-length": 128, "warmup-steps": 32, "held-out": 48, "judged": 8,
        "orders": 4, "sample-rows": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    path = Path(options.out) / "results.json"
    if options.show:
        runs = files.read_json(path)["runs"]
    else:
        if not options.model:
            parser.error("--model is needed, unless --show is given")
        runs = []
        for name in options.cases.split(","):
            for seed in range(options.seeds):
                runs += one_seed(options, name, seed)
        asked = vars(options) | {"out": "", "model": Path(options.model).name}
        files.write_json(path, {"options": asked, "runs": runs})
    for case in dict.fromkeys(run["case"] for run in runs):
        print("\n".join(table(runs, case)) + "\n")


if __name__ == "__main__":
    main()
