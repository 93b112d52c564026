"""Which selection trains best? Methods x targets x seeds on one pool: held-out loss, accuracy, and what each one costs.

    python -m tests.benchmarks.compare_selections --out runs/compare
    python -m tests.benchmarks.compare_selections --out runs/compare --targets gsm8k,dbpedia --arms "random tfidf auto"

An arm is a method, and settings after a colon: `less:selector=round_robin,common=10`. Everything goes through the
commands that users type: `select`, then `audit` with the same recipe for all arms. All arms share one warm-up, whose
last checkpoint they use unless they say otherwise. Runs in `--out` are kept and continued, and arms that choose the
same rows share their training. The first seed of every arm comes first, so that an interrupted benchmark has the whole
table with fewer seeds. Needs ../shared/data (or DATATOOLS_SHARED). Writes `results.json` to `--out` and prints the
tables after each target; `--show` prints those of a results file. `--select-with` chooses the rows with another model
than the one that is trained on them (`transfer.py` makes smaller ones by dropping layers).
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from datatools import t_interval
from datatools.stats import ranks
from pipelines.cli.app import main as datatools
from pipelines.runs.messages import quietly
from pipelines.settings.methods import known
from pipelines.settings.select import WarmupConfig

SHARED = Path(os.environ.get("DATATOOLS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TARGETS = {"gsm8k": "loss", "dbpedia": "exact", "superglue_like": "exact", "bbh": "exact", "mbpp": "loss"}
"""The metric of each target besides the loss. A model of 135M weights solves no task of gsm8k or mbpp."""

LAST = "features.checkpoints=last"
ARMS = (
    "random",
    "random-length",
    "tfidf",
    "bm25",
    "auto",
    f"less:{LAST}",
    f"less:{LAST},selector=round_robin",
    f"less:{LAST},selector=round_robin,common=10",
    "gist",
    "rds",
    "rds:selector=round_robin",
    "less",
    "less:selector=round_robin",
    "tov",
    "tacs",
)
BACKWARD = 3.0
"""A token with its gradients costs as much as three tokens in a forward pass."""


def command(*words: object) -> None:
    """Run one command, which must succeed."""
    argv = [str(word) for word in words]
    if code := datatools(argv):
        raise SystemExit(f"datatools {' '.join(argv)} ended with {code}")


@dataclass(frozen=True)
class Problem:
    """A pool and its targets, and how the models that are trained on a selection are judged.

    Attributes:
        pool: The rows to choose from.
        metrics: Target -> what is measured besides the loss.
        wanted: Target -> the file of its rows.
        held_out: Target -> the file of its held-out rows.
        sources: Target -> the sources of the pool with the same task as the target, and those of the same kind.
        extract: How an answer is taken from what a model writes.
        right: (id of a held-out row, what was written) -> whether it is right, where a task has a checker of its own.
    """

    pool: Path
    metrics: Mapping[str, str]
    wanted: Callable[[str], Path]
    held_out: Callable[[str], Path]
    sources: Callable[[str], tuple[set[str], set[str]]]
    extract: str = "auto"
    right: Callable[[str, str], bool] | None = None


def shared(options: argparse.Namespace) -> Problem:
    """The pools and targets of ../shared/data."""
    targets = SHARED / "data" / "targets"
    relevance = json.loads((targets / "relevance.json").read_text())

    def held_out(target: str) -> Path:
        """A file with evenly spaced test rows of a target."""
        lines = (targets / target / "test.jsonl").read_bytes().splitlines(keepends=True)
        count = min(options.test_rows, len(lines))
        path = Path(options.out) / "tests" / f"{target}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(lines[i * len(lines) // count] for i in range(count)))
        return path

    def sources(target: str) -> tuple[set[str], set[str]]:
        return set(relevance[target]["core"]), set(relevance[target]["related"])

    pool = SHARED / "data" / "train" / options.pool
    return Problem(pool, TARGETS, lambda target: targets / target / "dev.jsonl", held_out, sources)


def measure(problem: Problem, target: str, arm: str, seeds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Select by one arm for one target, train with each seed, and return losses, accuracies and the cost."""
    method, _, settings = arm.partition(":")
    out = Path(options.out)
    run = out / target / arm.translate(str.maketrans(":,=", "---"))
    words = [*select_words(problem, target, options), "--method", method, "--out", run]
    words += ["--checkpoints", out / "warm" / "warmup"]
    for pair in (pair for pair in settings.split(",") if pair):
        words += ["--set", pair]
    command(*words, "--accept-change", "code")
    summary = json.loads((run / "summary.json").read_text())
    about = {"target": target, "arm": arm, "shares": shares(run, *problem.sources(target))}
    about["passes"] = passes(method, summary, out)
    if seeds == 0:
        return about
    trained = []
    if options.select_with is not None:
        trained = ["--model", options.model, "--set", f"model.chat={options.chat}"]
    if options.learning_rate is not None:
        trained += ["--learning-rate", options.learning_rate]
    command(
        *("audit", "--selected", run / "selected.jsonl", "--pool", problem.pool, "--test", problem.held_out(target)),
        *("--against", "random", "--seeds", seeds, "--epochs", options.epochs, "--batch-size", 4),
        *("--metric", problem.metrics.get(target, "loss"), "--extract", problem.extract),
        *("--out", run / f"audit-{seeds}", *trained),
        *("--set", f"arms={out / 'arms'}", "--accept-change", "code"),
    )
    audit = json.loads((run / f"audit-{seeds}" / "audit.json").read_text())
    ours = "random" if method == "random" else "selected"
    rows = [row for row in audit["rows"] if row["arm"] == ours]
    untrained = {metric["name"]: metric["table"][0]["mean"] for metric in audit["metrics"]}
    found: dict[str, Any] = {"losses": [row["loss"] for row in rows], "untrained": untrained}
    for metric in audit["metrics"]:
        if metric["name"] != "loss":
            found["accuracies"] = [row["metrics"][metric["name"]]["accuracy"] for row in rows]
    if problem.right is not None:
        right = checked(problem.right, run / f"audit-{seeds}" / "predictions.jsonl")
        untrained["checked"] = right["untrained"][0]
        found["checked"] = right[ours]
    return about | found


def select_words(problem: Problem, target: str, options: argparse.Namespace) -> list[object]:
    """Return the command that all selections for a target have in common."""
    model, chat = options.select_with or options.model, options.select_chat or options.chat
    return [
        *("select", "--model", model, "--chat-template", chat, "--train", problem.pool, "--on-bad-row", "skip"),
        *("--target", problem.wanted(target), "--budget", options.budget),
        *("--set", f"features.folder={Path(options.out) / 'features'}"),
    ]


def checked(right: Callable[[str, str], bool], predictions: Path) -> dict[str, list[float]]:
    """Return the share of right answers by the checker of the task, for each arm, in the order of the seeds."""
    by_run: dict[tuple[str, int], list[bool]] = {}
    for row in map(json.loads, predictions.read_text().splitlines()):
        if "text" in row:
            by_run.setdefault((row["arm"], row.get("seed", 0)), []).append(right(row["id"], row["text"]))
    found: dict[str, list[float]] = {}
    for arm, seed in sorted(by_run):
        found.setdefault(arm, []).append(fmean(by_run[arm, seed]))
    return found


def shares(run: Path, same: set[str], kind: set[str]) -> list[float]:
    """Return which shares of the chosen rows come from sources of the target's task, and from others of its kind."""
    found = [json.loads(line)["dataset"] for line in (run / "selected.jsonl").read_text().splitlines()]
    return [sum(source in group for source in found) / len(found) for group in (same, kind)]


def passes(method: str, summary: dict[str, Any], out: Path) -> float:
    """Return what the scores would cost without features of other runs, in forward passes over the pool."""
    before = summary["cost"]["before"]
    tokens = before["tokens"] + before.get("given", 0.0)
    if "gradients" not in known(method).needs:
        return float(tokens / summary["pool"]["tokens"])
    warm = len(json.loads((out / "warm" / "warmup" / "rows.json").read_text())["keys"]) * WarmupConfig().epochs
    return float(BACKWARD * (tokens / summary["pool"]["tokens"] + warm / summary["pool"]["rows"]))


def table(results: list[dict[str, Any]], key: str) -> str:
    """Means of the losses or accuracies with 95 % intervals over seeds, differences from auto, and mean ranks."""
    found = {(row["target"], row["arm"]): row for row in results if row.get(key)}
    targets, arms = list(dict.fromkeys(t for t, _ in found)), list(dict.fromkeys(arm for _, arm in found))
    whole = [t for t in targets if all((t, arm) in found for arm in arms)]
    sign = 1.0 if key == "losses" else -1.0
    by_target = [ranks([sign * fmean(found[t, arm][key]) for arm in arms]).tolist() for t in whole]
    lines = ["| arm | " + " | ".join(targets) + " | mean rank | passes |", "| --- |" + " --- |" * (len(targets) + 2)]
    for place, arm in enumerate(arms):
        rank = f"{fmean(row[place] for row in by_target):.2f}" if whole else ""
        cells = [cell(found.get((t, arm)), found.get((t, "auto")), key) for t in targets]
        cost = fmean(row["passes"] for row in results if row["arm"] == arm)
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {rank} | {cost:.1f} |")
    names = {"losses": {"loss"}, "checked": {"checked"}}.get(key)

    def bare_of(means: dict[str, float]) -> float:
        kept = {name: mean for name, mean in means.items() if name in (names or means.keys() - {"loss", "checked"})}
        return next(iter(kept.values()))

    bare = [bare_of(found[t, arms[0]]["untrained"]) for t in targets]
    return "\n".join([*lines, "| untrained | " + " | ".join(f"{value:.3f}" for value in bare) + " | | |"])


def cell(row: dict[str, Any] | None, auto: dict[str, Any] | None, key: str) -> str:
    """Format a mean; in brackets its difference from auto's, with an interval where there are three seeds or more."""
    if row is None:
        return ""
    text = f"{fmean(row[key]):.3f}"
    if auto is None or auto is row or not auto.get(key):
        return text
    pairs = [ours - theirs for ours, theirs in zip(row[key], auto[key], strict=False)]
    mean, low, high = t_interval(pairs)
    return f"{text} ({mean:+.3f})" if low is None or len(pairs) < 3 else f"{text} ({low:+.3f} to {high:+.3f})"


def composition(results: list[dict[str, Any]]) -> str:
    """Return the shares of chosen rows that have the target's task, and, after a +, a task of the same kind."""
    found = {(row["target"], row["arm"]): row["shares"] for row in results if "shares" in row}
    targets, arms = list(dict.fromkeys(t for t, _ in found)), list(dict.fromkeys(arm for _, arm in found))
    lines = ["| arm | " + " | ".join(targets) + " | mean |", "| --- |" + " --- |" * (len(targets) + 1)]
    for arm in arms:
        own = [found[t, arm] for t in targets if (t, arm) in found]
        cells = ["{:.2f} + {:.2f}".format(*found[t, arm]) if (t, arm) in found else "" for t in targets]
        mean = "{:.2f} + {:.2f}".format(*(fmean(part) for part in zip(*own, strict=True)))
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)


def tables(results: list[dict[str, Any]]) -> str:
    """Return all tables of a benchmark."""
    kinds = [key for key in ("losses", "accuracies", "checked") if any(row.get(key) for row in results)]
    parts = [f"{key}:\n\n{table(results, key)}" for key in kinds]
    if any("shares" in row for row in results):
        parts.append(f"shares of rows with the target's task, and of its kind:\n\n{composition(results)}")
    return "\n\n".join(parts)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that all problems have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2", help="the model that is trained")
    parser.add_argument("--chat", default="auto", help="its chat template")
    parser.add_argument("--select-with", default=None, help="the model that selects; by default the same")
    parser.add_argument("--select-chat", default=None, help="the chat template of the model that selects")
    parser.add_argument("--targets", default=None, help="names separated by commas; by default all")
    parser.add_argument("--arms", default=None, help="names separated by spaces; by default all")
    parser.add_argument("--budget", default="50")
    parser.add_argument("--seeds", type=int, default=3, help="training runs per arm; 0 only selects")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=None, help="by default that of the warm-up")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--show", action="store_true", help="print the tables of what is there, and run nothing")
    return parser


def compare(make: Callable[[argparse.Namespace], Problem], options: argparse.Namespace) -> None:
    """Measure every arm on every target; print the tables after each target. `--show` makes no problem."""
    arms = options.arms.split() if options.arms else list(ARMS)
    out = Path(options.out)
    kept = out / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else []
    if options.show:
        print(tables(results))
        return
    problem = make(options)
    targets = options.targets.split(",") if options.targets else list(problem.metrics)
    with quietly():
        if not (out / "warm" / "selected.jsonl").is_file():
            command(*select_words(problem, targets[0], options), "--method", "auto", "--out", out / "warm")
        for seeds in range(min(1, options.seeds), options.seeds + 1):
            for target in targets:
                for arm in arms:
                    there = next((r for r in results if (r["target"], r["arm"]) == (target, arm)), None)
                    if there is None or len(there.get("losses", ())) < seeds:
                        made = measure(problem, target, arm, seeds, options)
                        results = [r for r in results if r is not there] + [made]
                        kept.write_text(json.dumps(results, indent=1))
                print(tables(results), flush=True)


def main() -> None:
    """Compare on the pools and targets of ../shared/data."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("--pool", default="mix-1k.jsonl")
    parser.add_argument("--out", default="runs/compare-selections")
    options = parser.parse_args()
    compare(shared, options)


if __name__ == "__main__":
    main()
