"""A run folder that is made up here."""

import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipelines.report import terminal

SOURCES = (  # name, share of the pool, mean score, log-mean of the answer length
    ("encyclopedia_rewrite", 0.19, -0.004, 3.8),
    ("repair_questions", 0.15, -0.008, 2.5),
    ("topic_labels", 0.125, -0.012, 1.0),
    ("everyday_choice", 0.105, 0.004, 1.7),
    ("concept_sentences", 0.08, 0.002, 2.0),
    ("small_programs", 0.07, 0.012, 4.3),
    ("well_formed", 0.058, -0.015, 0.4),
    ("word_problems", 0.048, 0.046, 4.4),
    ("entailment", 0.04, -0.002, 1.1),
    ("yes_no", 0.033, -0.006, 0.5),
    ("reading", 0.02, 0.001, 1.5),
    ("tasks_with_tests", 0.017, 0.014, 3.9),
    ("algebra_drill", 0.015, 0.03, 1.1),
    ("multi_step", 0.013, 0.024, 3.8),
    ("characters", 0.011, -0.01, 4.6),
    ("options_with_reasons", 0.009, 0.038, 4.3),
    ("instructions", 0.006, 0.0, 3.7),
    ("queries", 0.0045, 0.003, 5.3),
    ("short_problems", 0.003, 0.03, 2.9),
    ("causes", 0.0025, -0.003, 0.7),
)
SUBTASKS = ("counting", "dates", "geometry", "money", "rates")
PROMPT = (
    "A baker fills {a} trays with {b} rolls each and sells {c} of them before noon. How many rolls are left?\n"
    "Show the steps."
)
ANSWER = "There are {a} x {b} = {n} rolls at first.\nAfter the sale {n} - {c} = {r} are left.\nThe answer is {r}."


def example(rank: int, score: float, source: str, i: int, nearest: bool = True) -> dict[str, Any]:
    a, b, c = 4 + i, 12 + 2 * i, 7 + i
    words = {"a": a, "b": b, "c": c, "n": a * b, "r": a * b - c}
    item: dict[str, Any] = {
        "rank": rank,
        "score": score,
        "source": source,
        "id": f"{source}_{17 * i + 3}",
        "where": f"data/pool.jsonl:{101 + 37 * i}",
        "prompt": PROMPT.format(**words),
        "answer": ANSWER.format(**words),
        "nearest": None,
    }
    if nearest:
        item["nearest"] = {
            "id": f"target_{i}",
            "similarity": score + 0.02,
            "prompt": f"Mia saves {a} coins a week. How many has she after {b} weeks?",
            "answer": f"{a} coins a week for {b} weeks is {a * b} coins.",
        }
    return item


def make_run(folder: Path, n: int = 2000, *, seed: int = 0, method: str = "less", audit: bool = True) -> dict[str, Any]:
    """Write scores.parquet and summary.json of a made-up run over n rows; returns the summary."""
    rng = np.random.default_rng(seed)
    weights = np.array([share for _, share, _, _ in SOURCES])
    code = rng.choice(len(SOURCES), n, p=weights / weights.sum())
    supervised = np.maximum(1, rng.lognormal(np.array([x[3] for x in SOURCES])[code], 0.6)).astype(int)
    tokens = supervised + rng.integers(30, 160, n)
    status = np.where(rng.random(n) < 0.018, "duplicate", np.where(rng.random(n) < 0.004, "empty", "ok"))
    ok = status == "ok"
    by_task = np.array([x[2] for x in SOURCES])[code][:, None] + rng.normal(0, 0.016, (n, len(SUBTASKS)))
    by_task += rng.normal(0, 0.012, (n, 1)) + np.array([0.004, -0.002, 0.0, 0.006, 0.003])
    score = by_task.max(1)
    k = max(1, n // 20)
    randomly = method.startswith("random")
    order = rng.permutation(np.flatnonzero(ok)) if randomly else sorted(np.flatnonzero(ok), key=lambda i: -score[i])
    selected = np.zeros(n, dtype=bool)
    selected[order[:k]] = True
    rank = np.full(n, -1)
    rank[order] = np.arange(1, len(order) + 1)
    names = [SOURCES[i][0] for i in code]
    columns: dict[str, Any] = {
        "_id": [f"{name}_{i}" for i, name in enumerate(names)],
        "_source": names,
        "_file": ["data/pool.jsonl"] * n,
        "_line": np.arange(1, n + 1),
        "_key": [f"{i:032x}" for i in range(n)],
        "_tokens": tokens,
        "_supervised": supervised,
        "_status": status,
        "_score": [None if randomly or not good else float(v) for v, good in zip(score, ok, strict=True)],
        "_rank": [None if r < 0 else int(r) for r in rank],
        "_selected": selected,
        "_nearest": [None] * n,
        "_nearest_similarity": [None] * n,
        "_norm": np.where(ok, 1.0, 0.0),
    }
    if not randomly and method != "loss":
        columns |= {f"subtask:{name}": by_task[:, j] for j, name in enumerate(SUBTASKS)}
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [
            (
                name,
                pa.float32()
                if name.startswith(("subtask:", "_score", "_norm", "_nearest_s"))
                else pa.bool_()
                if name == "_selected"
                else pa.int64()
                if name in ("_line", "_tokens", "_supervised", "_rank")
                else pa.string(),
            )
            for name in columns
        ]
    )
    pq.write_table(pa.table(columns, schema=schema), folder / "scores.parquet")

    less = method == "less"
    count = np.bincount(code, minlength=len(SOURCES))
    took = np.bincount(code[selected], minlength=len(SOURCES))
    losses = {
        "selected": (1.412, 1.405, 1.418),
        "random": (1.466, 1.449, 1.471),
        "random-length": (1.448, 1.452, 1.441),
        "tfidf": (1.419, 1.424, 1.409),
    }
    runs = [
        {"arm": arm, "seed": s, "loss": loss, "tokens": 61240}
        for arm, values in losses.items()
        for s, loss in enumerate(values)
    ]
    table = []
    for arm, values in losses.items():
        mean, half = float(np.mean(values)), 4.303 * float(np.std(values, ddof=1)) / math.sqrt(3)
        table.append(
            {
                "arm": arm,
                "mean": mean,
                "low": mean - half,
                "high": mean + half,
                "n": 3,
                "delta_vs_selected": mean - float(np.mean(losses["selected"])),
            }
        )
    table.append({"arm": "untrained", "mean": 1.93, "low": None, "high": None, "n": 1, "delta_vs_selected": 0.518})
    ranked = [] if randomly else [int(i) for i in order]
    nearest = not randomly and method != "loss"
    summary: dict[str, Any] = {
        "title": "Rows for arithmetic word problems",
        "command": "datatools select --model ./smol-135m --train data/pool.jsonl --target data/t.jsonl --out runs/less",
        "created": "2026-11-22T09:41:00+00:00",
        "method": method,
        "formula": {
            "name": {"less": "less-paper", "tfidf": "tfidf-cosine", "rds": "rds-cosine", "loss": "mean-loss"}.get(
                method, method
            ),
            "text": {
                "less": "max over subtasks of mean over target rows of sum_c w_c cos(adam(g_row; c), g_target; c)",
                "loss": "mean cross-entropy over supervised tokens, highest first",
            }.get(method, ""),
            "notes": [
                "Epsilon stands outside the root, moments are bias-corrected; the published code differs in both."
            ]
            if less
            else [],
        },
        "model": {
            "name": "smol-135m",
            "parameters": 134_515_008,
            "trainable": 1_843_200,
            "seen_share": 0.961,
            "unseen": ["model.layers.29.mlp.down_proj.lora_A", "model.layers.29.mlp.down_proj.lora_B"],
        }
        if method in ("less", "rds", "loss")
        else None,
        "warnings": ["25 rows were cut at 512 tokens: their answers are not seen whole."],
        "cost": {
            "before": {"rows": n, "tokens": int(tokens.sum()), "seconds": 702.0, "bytes": 36_000_000},
            "after": {
                "rows": int(ok.sum()),
                "tokens": int(tokens[ok].sum()),
                "seconds": 813.4,
                "bytes": 38_211_904,
                "peak_rss_bytes": 1_912_000_000,
            },
            "stages": [
                {"name": "read and encode", "seconds": 9.2},
                {"name": "warm-up training", "seconds": 141.7},
                {"name": "target gradients", "seconds": 11.8},
                {"name": "pool gradients", "seconds": 560.1},
                {"name": "scores", "seconds": 1.9},
                {"name": "audit", "seconds": 88.7},
            ],
        },
        "pool": {
            "rows": n,
            "tokens": int(tokens.sum()),
            "supervised_tokens": int(supervised.sum()),
            "files": [
                {"path": "data/pool.jsonl", "rows": n, "bytes": 1_234_567, "digest": "5f0c2b9a7de14c3388aa10c7b2f46e91"}
            ],
            "bad": [
                {"reason": "bad_json", "count": 3, "example": "data/pool.jsonl:481"},
                {"reason": "no_supervised_token", "count": 9, "example": "data/pool.jsonl:77"},
            ],
            "duplicates": int((status == "duplicate").sum()),
            "cut_tokens": 1204,
            "cut_rows": 25,
        },
        "target": {
            "rows": 25,
            "files": [
                {"path": "data/target.jsonl", "rows": 25, "bytes": 9_876, "digest": "a1d2770c51ee4f0f9b3e6c8d20b41f57"}
            ],
            "subtasks": [{"name": name, "rows": 5} for name in SUBTASKS],
        },
        "budget": {"asked": "5%", "rows": int(selected.sum()), "tokens": int(tokens[selected].sum())},
        "sources": [
            {
                "source": SOURCES[j][0],
                "pool_rows": int(count[j]),
                "selected_rows": int(took[j]),
                "pool_share": count[j] / n,
                "selected_share": took[j] / selected.sum(),
            }
            for j in range(len(SOURCES))
        ],
        "best": [example(i + 1, float(score[row]), names[row], i, nearest) for i, row in enumerate(ranked[:8])],
        "worst": [
            example(len(ranked) - i, float(score[row]), names[row], i + 9, nearest)
            for i, row in enumerate(ranked[:-9:-1])
        ],
        "checkpoints": [
            {"path": f"warmup/checkpoint-{step}", "step": step, "mean_lr": lr, "weight": lr / 4e-5}
            for step, lr in ((4, 1.69e-5), (8, 1.29e-5), (12, 7.7e-6), (16, 2.6e-6))
        ]
        if less
        else [],
        "seeds": {"run": 0, "projector": 0, "warm-up": 0},
        "audit": {"metric": "held-out loss", "rows": runs, "table": table, "verdict": ""} if audit else None,
        "versions": {"datatools": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return summary


def words(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body).replace("\u00a0", " "))


def printed(summary: dict[str, Any], width: int = 80) -> str:
    out = StringIO()
    terminal.show(summary, Console(file=out, width=width))
    return out.getvalue()
