"""Which selection trains best? Methods x targets x seeds on one pool: held-out loss, accuracy, and what each one costs.

    python -m tests.benchmarks.compare_selections --out runs/compare
    python -m tests.benchmarks.compare_selections --out runs/compare --targets gsm8k,dbpedia --arms "random tfidf auto"

An arm is a method, and settings after a colon: `less:selector=round_robin,common=10`. Everything goes through the
commands that users type: `select`, then `audit` with the same recipe for all arms. All arms share one warm-up, whose
last checkpoint they use unless they say otherwise. Runs in `--out` are kept and continued, and arms that choose the
same rows share their training. The first seed of every arm comes first, so that an interrupted benchmark has the whole
table with fewer seeds. Needs ../shared/data (or DATATOOLS_SHARED). Writes `results.json` to `--out` and prints the
tables after each target; `--show` prints those of a results file.
"""

import argparse
import json
import os
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


def held_out(target: str, options: argparse.Namespace) -> Path:
    """A file with evenly spaced test rows of a target."""
    lines = (SHARED / "data" / "targets" / target / "test.jsonl").read_bytes().splitlines(keepends=True)
    count = min(options.test_rows, len(lines))
    path = Path(options.out) / "tests" / f"{target}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines[i * len(lines) // count] for i in range(count)))
    return path


def measure(target: str, arm: str, seeds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Select by one arm for one target, train with each seed, and return losses, accuracies and the cost."""
    method, _, settings = arm.partition(":")
    out = Path(options.out)
    run = out / target / arm.translate(str.maketrans(":,=", "---"))
    pool = SHARED / "data" / "train" / options.pool
    words = ["select", "--model", options.model, "--chat-template", options.chat, "--train", pool, "--method", method]
    words += ["--budget", options.budget, "--on-bad-row", "skip", "--checkpoints", out / "warm" / "warmup"]
    words += ["--target", SHARED / "data" / "targets" / target / "dev.jsonl", "--out", run]
    for pair in (f"features.folder={out / 'features'}", *(pair for pair in settings.split(",") if pair)):
        words += ["--set", pair]
    command(*words, "--accept-change", "code")
    command(
        *("audit", "--selected", run / "selected.jsonl", "--pool", pool, "--test", held_out(target, options)),
        *("--against", "random", "--seeds", seeds, "--epochs", options.epochs, "--batch-size", 4),
        *("--metric", TARGETS.get(target, "loss"), "--out", run / f"audit-{seeds}"),
        *("--set", f"arms={out / 'arms'}", "--accept-change", "code"),
    )
    audit = json.loads((run / f"audit-{seeds}" / "audit.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    ours = "random" if method == "random" else "selected"
    rows = [row for row in audit["rows"] if row["arm"] == ours]
    untrained = {metric["name"]: metric["table"][0]["mean"] for metric in audit["metrics"]}
    found = {"target": target, "arm": arm, "losses": [row["loss"] for row in rows], "untrained": untrained}
    for metric in audit["metrics"]:
        if metric["name"] != "loss":
            found["accuracies"] = [row["metrics"][metric["name"]]["accuracy"] for row in rows]
    return found | {"passes": passes(method, summary, out)}


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
    sign = -1.0 if key == "accuracies" else 1.0
    by_target = [ranks([sign * fmean(found[t, arm][key]) for arm in arms]).tolist() for t in whole]
    lines = ["| arm | " + " | ".join(targets) + " | mean rank | passes |", "| --- |" + " --- |" * (len(targets) + 2)]
    for place, arm in enumerate(arms):
        rank = f"{fmean(row[place] for row in by_target):.2f}" if whole else ""
        cells = [cell(found.get((t, arm)), found.get((t, "auto")), key) for t in targets]
        cost = fmean(row["passes"] for row in results if row["arm"] == arm)
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {rank} | {cost:.1f} |")
    losses = key == "losses"
    bare = [
        next(mean for name, mean in found[t, arms[0]]["untrained"].items() if (name == "loss") == losses)
        for t in targets
    ]
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


def main() -> None:
    """Measure every arm on every target; print the table after each target."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chat", default="auto")
    parser.add_argument("--pool", default="mix-1k.jsonl")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--arms", default=None, help="names separated by spaces; by default all")
    parser.add_argument("--budget", default="50")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--out", default="runs/compare-selections")
    parser.add_argument("--show", action="store_true", help="print the tables of what is there, and run nothing")
    options = parser.parse_args()
    arms, targets = options.arms.split() if options.arms else list(ARMS), options.targets.split(",")
    out = Path(options.out)
    kept = out / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else []
    if options.show:
        print("\n\n".join(table(results, key) for key in ("losses", "accuracies")))
        return
    with quietly():
        if not (out / "warm" / "selected.jsonl").is_file():
            command(
                *("select", "--model", options.model, "--chat-template", options.chat, "--on-bad-row", "skip"),
                *("--train", SHARED / "data" / "train" / options.pool),
                *("--target", SHARED / "data" / "targets" / targets[0] / "dev.jsonl", "--budget", options.budget),
                *("--method", "auto", "--out", out / "warm", "--set", f"features.folder={out / 'features'}"),
            )
        for seeds in range(1, options.seeds + 1):
            for target in targets:
                for arm in arms:
                    there = next((r for r in results if (r["target"], r["arm"]) == (target, arm)), None)
                    if there is None or len(there["losses"]) < seeds:
                        results = [r for r in results if r is not there] + [measure(target, arm, seeds, options)]
                        kept.write_text(json.dumps(results, indent=1))
                print("\n\n".join(table(results, key) for key in ("losses", "accuracies")), flush=True)


if __name__ == "__main__":
    main()
