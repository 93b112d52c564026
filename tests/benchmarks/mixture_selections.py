"""Which selection trains best on targets that took no part in any choice of a method? Six more, from another mixture.

    python -m tests.benchmarks.mixture_selections --out runs/mixture
    python -m tests.benchmarks.mixture_selections --out runs/mixture --arms "random tfidf auto" --seeds 1

Everything is as in `compare_selections`, with other rows, all from `mix-10k.jsonl` of ../shared/data: a pool in which
every source has about the same number of rows, and target rows that are in no pool. Three targets are *near*: their
sources are in the pool. Three are *far*: their sources are left out of the pool, so that only rows of related tasks can
help.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tests.benchmarks.compare_selections import SHARED, Problem, arguments, compare

MIXED = ("boolq", "common_gen", "commonsense_qa", "dbpedia", "disfl_qa", "mnli", "query_wellformedness", "wiki_split")
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "commonsense": (("commonsense_qa",), ("mnli",)),
    "mathematics": (("dm_math",), ("gsm8k",)),
    "mixed": (MIXED, ()),
    "passages": (("quoref",), ("boolq", "disfl_qa")),
    "word_problems": (("svamp", "aqua"), ("gsm8k", "dm_math")),
    "code": (("text2sql",), ("codegen", "mbpp")),
}
"""Target -> its sources, and the sources of the pool that are of the same kind."""

FAR = ("passages", "word_problems", "code")
"""The targets whose sources are not in the pool."""


def mixture(options: argparse.Namespace) -> Problem:
    """Write the pool and the targets to files, which are the same for the same seed."""
    draw = random.Random(options.data_seed)
    by_source: dict[str, list[dict[str, Any]]] = {}
    for line in (SHARED / "data" / "train" / "mix-10k.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_source.setdefault(row["dataset"], []).append(row)
    for rows in by_source.values():
        draw.shuffle(rows)
    parts: dict[str, list[dict[str, Any]]] = {}
    for target, (sources, _) in TARGETS.items():
        for part, count in (("wanted", options.target_rows), ("tests", options.test_rows)):
            parts[f"{target}-{part}"] = [by_source[sources[i % len(sources)]].pop() for i in range(count)]
    inside = sorted(by_source.keys() - {source for target in FAR for source in TARGETS[target][0]})
    share = options.pool_rows // len(inside)
    parts["pool"] = [row for source in inside for row in by_source[source][:share]]
    draw.shuffle(parts["pool"])
    folder = Path(options.out) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Problem(
        pool=folder / "pool.jsonl",
        metrics=dict.fromkeys(TARGETS, "loss"),
        wanted=lambda target: folder / f"{target}-wanted.jsonl",
        held_out=lambda target: folder / f"{target}-tests.jsonl",
        sources=lambda target: (set(TARGETS[target][0]), set(TARGETS[target][1])),
    )


def main() -> None:
    """Compare on other targets of another mixture."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.set_defaults(test_rows=30)  # the smallest source of a target has 45 rows
    parser.add_argument("--pool-rows", type=int, default=800)
    parser.add_argument("--target-rows", type=int, default=12)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--out", default="runs/mixture-selections")
    options = parser.parse_args()
    compare(mixture, options)


if __name__ == "__main__":
    main()
