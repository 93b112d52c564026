"""Which selection trains best? Methods x targets x seeds on one pool, by held-out loss, with what each one costs.

    python -m tests.benchmarks.compare_selections --out runs/compare --budget 40
    python -m tests.benchmarks.compare_selections --out runs/compare --targets gsm8k,dbpedia --arms random,tfidf,auto

An arm is a method, and settings behind a colon: `less:aggregate=round_robin,common=10`. Everything goes through the
commands that users type (`select`, then `audit` with the same recipe for all). Runs in `--out` are kept and continued,
and arms that pick the same rows share their training. Needs ../shared/data (or DATATOOLS_SHARED). Writes
`results.json` to `--out` and prints the table, with mean ranks and the cost of each arm.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from datatools import t_interval
from datatools.stats import ranks
from pipelines.cli.app import main as datatools
from pipelines.runs.messages import quietly

SHARED = Path(os.environ.get("DATATOOLS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TARGETS = "gsm8k,dbpedia,superglue_like,bbh,mbpp"
ARMS = (
    "random",
    "random-length",
    "tfidf",
    "bm25",
    "rds",
    "rds:selector=round_robin",
    "less",
    "less:selector=round_robin",
    "less:selector=round_robin,common=10",
    "gist",
    "auto",
)


def command(*words: object) -> None:
    """Run one command, which must succeed."""
    argv = [str(word) for word in words]
    if code := datatools(argv):
        raise SystemExit(f"datatools {' '.join(argv)} ended with {code}")


def held_out(target: str, options: argparse.Namespace) -> Path:
    """A file with evenly spaced test rows of a target."""
    lines = (SHARED / "data" / "targets" / target / "test.jsonl").read_bytes().splitlines(keepends=True)
    count = min(options.test_rows, len(lines))
    path = Path(options.out) / "tests" / f"{target}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines[i * len(lines) // count] for i in range(count)))
    return path


def measure(target: str, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Select by one arm for one target, train with each seed, and return losses and costs."""
    method, _, settings = arm.partition(":")
    out = Path(options.out)
    run = out / target / arm.replace(":", "-").replace(",", "-").replace("=", "-")
    pool = SHARED / "data" / "train" / options.pool
    sets = [f"features.folder={out / 'features'}", *(pair for pair in settings.split(",") if pair)]
    words = ["select", "--model", options.model, "--chat-template", options.chat, "--train", pool, "--method", method]
    words += ["--on-bad-row", "skip"]
    words += ["--budget", options.budget]
    words += ["--target", SHARED / "data" / "targets" / target / "dev.jsonl", "--out", run]
    warm = sorted((out / "warm" / "warmup").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in warm[-1:]:
        words += ["--checkpoints", checkpoint]
    for pair in sets:
        words += ["--set", pair]
    command(*words, "--accept-change", "code")
    command(
        *("audit", "--selected", run / "selected.jsonl", "--pool", pool, "--test", held_out(target, options)),
        *("--against", "random", "--seeds", options.seeds, "--epochs", options.epochs, "--batch-size", 4),
        *("--set", f"arms={out / 'arms'}", "--accept-change", "code"),
    )
    audit = json.loads((run / "audit" / "audit.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    losses = {name: [row["loss"] for row in audit["rows"] if row["arm"] == name] for name in ("selected", "random")}
    base = next(row["mean"] for row in audit["table"] if row["arm"] == "untrained")
    chosen = losses["random"] if method == "random" else losses["selected"]
    return {"target": target, "arm": arm, "losses": chosen, "untrained": base, "cost": summary.get("cost", {})}


def table(results: list[dict[str, Any]], arms: list[str], targets: list[str]) -> str:
    """Mean losses with 95 % intervals over seeds, and the mean rank over the targets that every arm has."""
    found = {(row["target"], row["arm"]): row for row in results}
    lines = ["| arm | " + " | ".join(targets) + " | mean rank |", "| --- |" + " --- |" * (len(targets) + 1)]
    means = [[t_interval(found[t, arm]["losses"])[0] for arm in arms] for t in targets]
    mean_rank = [sum(column) / len(targets) for column in zip(*(ranks(row).tolist() for row in means), strict=True)]
    for place, arm in enumerate(arms):
        cells = []
        for target in targets:
            mean, low, high = t_interval(found[target, arm]["losses"])
            cells.append(f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {mean_rank[place]:.2f} |")
    untrained = [f"{found[t, arms[0]]['untrained']:.3f}" for t in targets]
    return "\n".join([*lines, "| untrained | " + " | ".join(untrained) + " | |"])


def main() -> None:
    """Measure every arm on every target; print the table after each target."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chat", default="auto")
    parser.add_argument("--pool", default="mix-1k.jsonl")
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--arms", default=None, help="names separated by spaces; by default all")
    parser.add_argument("--budget", default="50")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test-rows", type=int, default=60)
    parser.add_argument("--out", default="runs/compare-selections")
    options = parser.parse_args()
    arms, targets = options.arms.split() if options.arms else list(ARMS), options.targets.split(",")
    out = Path(options.out)
    with quietly():
        if not (out / "warm" / "selected.jsonl").is_file():
            command(
                *("select", "--model", options.model, "--chat-template", options.chat, "--on-bad-row", "skip"),
                *("--train", SHARED / "data" / "train" / options.pool),
                *("--target", SHARED / "data" / "targets" / targets[0] / "dev.jsonl", "--budget", options.budget),
                *("--method", "auto", "--out", out / "warm", "--set", f"features.folder={out / 'features'}"),
            )
        results: list[dict[str, Any]] = []
        for place, target in enumerate(targets, start=1):
            results += [measure(target, arm, options) for arm in arms]
            (out / "results.json").write_text(json.dumps(results, indent=1))
            print(table(results, arms, targets[:place]), flush=True)


if __name__ == "__main__":
    main()
