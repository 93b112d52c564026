"""The report and the summary at the end: right numbers, absent parts left out, hostile texts inert."""

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from datatools.errors import DataError
from pipelines import texts
from pipelines.report import charts, page, select_page, terminal
from pipelines.report.audit_section import arms as arms_of
from pipelines.report.scores_section import read_scores

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# ---------------------------------------------------------------------------------------- a run folder, made up here

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


@pytest.fixture(scope="module")
def less(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("less")
    summary = make_run(folder)
    return folder, summary, select_page.render(folder).read_text(encoding="utf-8")


def rewrite(folder: Path, summary: dict[str, Any]) -> str:
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return select_page.render(folder).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body).replace("\u00a0", " "))


def printed(summary: dict[str, Any], width: int = 80) -> str:
    out = StringIO()
    terminal.show(summary, Console(file=out, width=width))
    return out.getvalue()


class Tags(HTMLParser):
    """Every start tag with its attributes, but for the badges that stand for hidden characters."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, attrs) != ("span", [("class", "u")]) and tag != "wbr":
            self.found.append((tag, dict(attrs)))


# ---------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("method", ["less", "random", "random-length", "tfidf", "rds", "loss", "something-new"])
@pytest.mark.parametrize("audit", [True, False])
def test_every_method_has_a_report(tmp_path: Path, method: str, audit: bool) -> None:
    summary = make_run(tmp_path, 400, method=method, audit=audit)
    page = select_page.render(tmp_path).read_text(encoding="utf-8")
    assert len(page.encode()) < 300_000
    text = words(page)
    assert "20 of 400 rows" in text
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", text)
    ids = set(re.findall(r'<section id="([a-z]+)"', page))
    assert ("audit" in ids) == audit
    assert ("distribution" in ids) == (not method.startswith("random"))
    assert ("target" in ids) == (method != "loss" and not method.startswith("random"))
    assert {"cost", "lengths", "sources", "quality", "provenance"} <= ids
    assert set(re.findall(r'<a href="#([a-z]+)"', page)) == ids  # the way in and the place agree
    printed(summary)


def test_headline_says_what_why_cost_and_trust(less: tuple[Path, dict[str, Any], str]) -> None:
    _, summary, page = less
    head = words(page[page.index('class="head"') : page.index('class="meaning"')])
    tokens = summary["budget"]["tokens"]
    for part in (
        "100 of 2,000 rows",
        f"5.0 % of the rows, {tokens:,} tokens",
        "Asked for: 5%",
        "LESS",
        "less-paper",
        "smol-135m",
        "25 rows in 5 subtasks",
        "13 min 33 s",
        "Estimated 11 min 42 s",
        "Beats random choice",
        "96.1 %",
    ):
        assert part in head
    assert words(page).index("25 rows were cut at 512 tokens") < words(page).index(
        "100 of 2,000 rows"
    )  # warnings on top
    assert "training on the row lowers the loss" in words(page)  # the sign convention of the spec, section 1


def test_numbers_are_those_of_the_table(less: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, page = less
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    chosen = [score for score, selected in zip(table["_score"], table["_selected"], strict=True) if selected]
    eligible = [score for score in table["_score"] if score is not None]
    assert f"cut-off {texts.number(min(chosen))}" in words(page)
    columns = [
        re.sub(",", "", text) for text in re.findall(r"<title>[^<]*?: ([\d,]+) rows, [\d,]+ chosen</title>", page)
    ]
    picked = [re.sub(",", "", text) for text in re.findall(r"<title>[^<]*? rows, ([\d,]+) chosen</title>", page)]
    assert sum(map(int, columns)) == len(eligible)
    assert sum(map(int, picked)) == len(chosen) == 100
    served = [
        max(SUBTASKS, key=lambda name, i=i: table[f"subtask:{name}"][i]) for i in range(2000) if table["_selected"][i]
    ]
    for name in SUBTASKS:
        assert re.search(rf"{name} .{{0,3}}{served.count(name)} ", words(page[page.index('id="target"') :]))
    assert f"{table['_status'].count('duplicate')} rows repeat another" in words(page)


def test_no_column_mixes_both_sides_of_the_cut(less: tuple[Path, dict[str, Any], str]) -> None:
    """A plain top-k has columns of chosen rows and columns of others, never both."""
    counts = re.findall(r"<title>[^<]*?: ([\d,]+) rows, ([\d,]+) chosen</title>", less[2])
    assert counts and all(int(b) in (0, int(a.replace(",", ""))) for a, b in counts)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("matched", "advice"),
    [
        (None, "Audit it against random rows of the same lengths"),
        (1.45, "did worse in the audit, so length does not explain everything"),
        (1.41, "length may explain everything"),
    ],
)
def test_length_driven_scores_are_called_out(tmp_path: Path, sign: int, matched: float | None, advice: str) -> None:
    summary = make_run(tmp_path, 500, audit=matched is not None)
    for row in summary["audit"]["rows"] if matched is not None else ():
        if row["arm"] == "random-length":
            row["loss"] = matched + 0.001 * row["seed"]
    table = pq.read_table(tmp_path / "scores.parquet")
    lengths = table["_supervised"].to_numpy() * float(sign)
    place = table.column_names.index("_score")
    pq.write_table(table.set_column(place, "_score", pa.array(lengths)), tmp_path / "scores.parquet")
    text = words(rewrite(tmp_path, summary))
    assert f"Scores correlate with answer length (Spearman {'+' if sign > 0 else '−'}1.00)" in text
    assert f"tend to have {'long' if sign > 0 else 'short'} answers. " in text and advice in text


@pytest.mark.parametrize(
    ("ours", "theirs", "reading"),
    [
        ((1.40, 1.41, 1.42), (1.45, 1.46, 1.47), "better"),  # the same difference in each seed: interval of width zero
        ((1.45, 1.46, 1.47), (1.40, 1.41, 1.42), "worse"),
        ((1.40, 1.41, 1.42), (1.41, 1.41, 1.42), "unclear"),
        ((1.40, 1.50), (1.50, 1.60), "unclear"),  # whatever the interval of two says
        ((1.40,), (9.0,), "unclear"),
        ((1.40, 1.50), (1.41, 1.52), "unclear"),  # mean 0.015, half width 12.706 * 0.00707 / sqrt 2 = 0.0635
        (
            (1.40, 1.50, 1.60),
            (1.41, 1.52, 1.613),
            "better",
        ),  # mean 0.01433, half width 4.303 * 0.00513 / sqrt 3 = 0.01275
    ],
)
def test_reading_pairs_equal_seeds(ours: tuple[float, ...], theirs: tuple[float, ...], reading: str) -> None:
    rows = [
        {"arm": arm, "seed": s, "loss": v}
        for arm, values in (("selected", ours), ("random", theirs))
        for s, v in enumerate(values)
    ]
    table = [
        {"arm": "selected", "mean": float(np.mean(ours)), "n": 2},
        {"arm": "random", "mean": float(np.mean(theirs)), "n": 2},
    ]
    arms = arms_of({"rows": rows, "table": table}, "less")
    assert [arm.chosen for arm in arms] == [True, False]
    assert arms[1].reading == reading
    assert arms[1].delta == pytest.approx(np.mean(theirs) - np.mean(ours))


def test_reading_without_runs_needs_intervals_apart() -> None:
    def read(low: float, high: float, n: int = 3) -> str:
        table = [
            {"arm": "less", "mean": 1.4, "low": 1.38, "high": 1.42, "n": 3},
            {"arm": "random", "mean": 1.5, "low": low, "high": high, "n": n},
        ]
        return arms_of({"table": table}, "less")[1].reading

    assert (read(1.43, 1.57), read(1.41, 1.59), read(1.30, 1.37)) == ("better", "unclear", "worse")
    assert read(1.43, 1.57, n=2) == "unclear"


def test_verdict_is_plain_and_the_audits_own_words_win(less: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    summary = json.loads(json.dumps(less[1]))
    shutil.copy(less[0] / "scores.parquet", tmp_path)
    text = words(less[2])
    assert "Held-out loss is 0.0503 lower than with random rows" in text
    assert "no clear difference from rows picked by text similarity" in text
    summary["audit"]["verdict"] = "It beat random choice in all three runs."
    assert "It beat random choice in all three runs." in words(rewrite(tmp_path, summary))
    for row in summary["audit"]["rows"]:
        row["loss"] += 0.2 * (row["arm"] == "selected")
    for row in summary["audit"]["table"]:
        row["mean"] += 0.2 * (row["arm"] == "selected")
    summary["audit"]["verdict"] = None
    text = words(rewrite(tmp_path, summary))
    assert "Worse than random choice" in text and "higher than with random rows" in text
    assert "Beats" not in text


def test_selection_by_another_rule_draws_no_false_cut(tmp_path: Path) -> None:
    make_run(tmp_path, 500)
    table = pq.read_table(tmp_path / "scores.parquet")
    ok = np.array(table["_status"].to_pylist()) == "ok"
    anyhow = np.zeros(500, dtype=bool)
    anyhow[np.random.default_rng(3).choice(np.flatnonzero(ok), 25, replace=False)] = True
    place = table.column_names.index("_selected")
    pq.write_table(table.set_column(place, "_selected", pa.array(anyhow)), tmp_path / "scores.parquet")
    page = select_page.render(tmp_path).read_text(encoding="utf-8")
    assert "cut-off" not in words(page)


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in the summary; of a list its first item speaks for all."""
    for key, part in (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    ):
        yield (*here, key)
        yield from paths(part, (*here, key))


def test_any_part_may_be_absent_or_null(tmp_path: Path) -> None:
    summary = make_run(tmp_path, 60)
    scores = read_scores(tmp_path / "scores.parquet")
    template = page._environment().get_template("report.html")
    for path in list(paths(summary)):
        changed = json.loads(json.dumps(summary))
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = None
        assert "rows" in template.render(select_page.build(changed, scores), shown=3), path
        printed(changed)
        del parent[path[-1]]
        assert "rows" in template.render(select_page.build(changed, scores), shown=3), path
    assert "3 of 60 rows" in words(rewrite(tmp_path, {}))
    printed({})


@pytest.mark.parametrize("chosen", [0, 60])
def test_nothing_or_everything_chosen(tmp_path: Path, chosen: int) -> None:
    make_run(tmp_path, 60)
    table = pq.read_table(tmp_path / "scores.parquet")
    place = table.column_names.index("_selected")
    table = table.set_column(place, "_selected", pa.array([i < chosen for i in range(60)]))
    pq.write_table(table, tmp_path / "scores.parquet")
    assert f"{chosen} of 60 rows" in words(select_page.render(tmp_path).read_text(encoding="utf-8"))
    pq.write_table(table.slice(0, 0), tmp_path / "scores.parquet")
    select_page.render(tmp_path)


def test_equal_inputs_give_equal_bytes(less: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    for name in ("summary.json", "scores.parquet"):
        shutil.copy(less[0] / name, tmp_path)
    assert select_page.render(tmp_path).read_bytes() == (less[0] / "report.html").read_bytes()


def test_a_large_pool_is_binned(tmp_path: Path) -> None:
    make_run(tmp_path, 100_000)
    start = time.perf_counter()
    path = select_page.render(tmp_path)
    assert time.perf_counter() - start < 10  # 0.7 s on 2 busy cores, 2026-11-22
    assert path.stat().st_size < 120_000


def test_many_sources_and_subtasks_stay_readable(tmp_path: Path) -> None:
    summary = make_run(tmp_path, 1000)
    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    table["_source"] = [f"source_{i % 300}" for i in range(1000)]
    for j in range(57):
        table[f"subtask:subject_{j}"] = [-1.0] * 1000
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    summary["sources"] = [
        {"source": f"source_{i}", "pool_rows": 4, "selected_rows": 1, "pool_share": 1 / 300, "selected_share": 1 / 300}
        for i in range(300)
    ]
    text = words(rewrite(tmp_path, summary))
    assert "277 smaller sources" in text and "277 more sources" in text
    assert "57 of the 62 subtasks are served by no chosen row" in text


# ---------------------------------------------------------------------------------------- errors


def test_a_folder_without_a_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json"):
        select_page.render(tmp_path)
    make_run(tmp_path, 50)
    (tmp_path / "scores.parquet").unlink()
    with pytest.raises(DataError, match=r"scores\.parquet.*finished run"):
        select_page.render(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"[1, 2]"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    make_run(tmp_path, 50)
    whole = (tmp_path / "scores.parquet").read_bytes()
    (tmp_path / "scores.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"scores\.parquet"):
        select_page.render(tmp_path)
    (tmp_path / "scores.parquet").write_bytes(whole)
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(DataError, match=r"summary\.json"):
        select_page.render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, 50)
    table = pq.read_table(tmp_path / "scores.parquet").drop_columns(["_supervised"])
    pq.write_table(table, tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="no column '_supervised'"):
        select_page.render(tmp_path)


# ---------------------------------------------------------------------------------------- hostile text

PAYLOADS = (
    "</title><script>hit()</script>",
    "</style><script>hit()</script><style>",
    "--></textarea></svg></p></details><script src=//HOST/a.js></script>",
    "<img src=//HOST/b.png onerror=hit()>",
    "<svg/onload=hit()><animate onbegin=hit() attributeName=x dur=1s>",
    '" onmouseover=hit() autofocus onfocus=hit() x="',
    "' style='background:url(//HOST/c.png)' onclick='hit()",
    '<a href="javascript:hit()">open</a><base href=//HOST/><meta http-equiv=refresh content=0;url=//HOST/d>',
    "<iframe srcdoc='<script>parent.hit()</script>' src=//HOST/e></iframe><object data=//HOST/f></object>",
    "<style>@import url(//HOST/g.css);*{background:url(//HOST/h)}</style><link rel=stylesheet href=//HOST/i.css>",
    "{{ 7 * 191 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}{# #}",
    "[bold red]not bold[/bold red] [link=http://HOST/]x[/link] :smile:",
    "a\u202eb\u2066c\u200bd\ufeffe\x1b[31mf\x1b]8;;http://HOST/\x07g\x00h\x9bi\u2028j\U000e0041k\rl\nm\tn",
)


def spread(value: Any, payload: str) -> Any:
    """`value` with every string replaced; keys and the method's name stay."""
    if isinstance(value, dict):
        return {key: part if key == "method" else spread(part, payload) for key, part in value.items()}
    if isinstance(value, list):
        return [spread(part, payload) for part in value]
    return payload if isinstance(value, str) else value


def hostile_run(folder: Path, payload: str, n: int = 120) -> dict[str, Any]:
    """A run in which each text field of both files is `payload`."""
    summary: dict[str, Any] = spread(make_run(folder, n), payload)
    for i, row in enumerate([*summary["sources"], *summary["target"]["subtasks"]]):
        row["source" if "source" in row else "name"] = f"{payload}{i}"
    for name in ("seeds", "versions"):
        summary[name] = {payload: payload}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    table["_source"] = [payload + source for source in table["_source"]]
    table["_status"] = [status if status == "ok" else payload for status in table["_status"]]
    pq.write_table(
        pa.table(
            {
                f"subtask:{payload}{name[8:]}" if name.startswith("subtask:") else name: values
                for name, values in table.items()
            }
        ),
        folder / "scores.parquet",
    )
    return summary


def test_page_forbids_scripts_and_network_to_itself(less: tuple[Path, dict[str, Any], str]) -> None:
    found = Tags(less[2]).found
    policy = [attrs["content"] for tag, attrs in found if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and policy[0] is not None and policy[0].startswith(CSP)
    before = [tag for tag, _ in found][: next(i for i, (_, a) in enumerate(found) if "http-equiv" in a)]
    assert before == ["html", "head", "meta"]  # nothing can load before the policy stands
    check_tags(found)


def check_tags(found: list[tuple[str, dict[str, str | None]]]) -> None:
    tags = {tag for tag, _ in found}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "input",
        "audio",
        "video",
        "image",
        "use",
        "animate",
        "set",
        "foreignobject",
        "template",
        "textarea",
        "noscript",
    }
    for tag, attrs in found:
        assert not [
            name
            for name in attrs
            if name.startswith("on") or name in ("src", "srcdoc", "srcset", "action", "xlink:href")
        ]
        assert re.fullmatch(r"#[a-z]+", attrs.get("href") or "#a"), (tag, attrs)
        style = attrs.get("style") or ""
        assert re.fullmatch(r"((left|width|bottom|height):[\d.]+(%|px)?;?)*", style), style
    assert tags.issuperset({"main", "section"})


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_does_not_change_the_page(tmp_path: Path, payload: str) -> None:
    """The page's tags are those of a page with a harmless word in each field: no text can open, close or alter one."""
    hostile_run(tmp_path / "bad", payload)
    hostile_run(tmp_path / "good", "word")
    bad, good = (select_page.render(tmp_path / name).read_text(encoding="utf-8") for name in ("bad", "good"))
    tags = [
        [(tag, {k: v for k, v in attrs.items() if k != "aria-label"}) for tag, attrs in Tags(page).found]
        for page in (bad, good)
    ]
    assert tags[0] == tags[1]
    check_tags(Tags(bad).found)
    assert "1337" not in words(bad)
    assert texts.visible(bad, "\n\t") == bad


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_is_printed_literally(tmp_path: Path, payload: str) -> None:
    summary = hostile_run(tmp_path, payload)
    text = printed(summary)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert all(len(line) <= 80 for line in text.splitlines())
    if "[bold red]" in payload:
        assert "[bold red]not bold[/bold red]" in text and ":smile:" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminal_of_any_encoding(less: tuple[Path, dict[str, Any], str], encoding: str) -> None:
    summary = json.loads(json.dumps(less[1]))
    summary["best"][0]["prompt"] = "naïve 数 \ud800 \U0001f600"
    raw = BytesIO()
    console = Console(file=TextIOWrapper(raw, encoding=encoding, write_through=True), width=80)
    terminal.show(summary, console)
    assert b"100 of 2,000 rows chosen" in raw.getvalue()


def test_terminal_fits_80_columns_and_says_the_same(less: tuple[Path, dict[str, Any], str]) -> None:
    text = printed(less[1])
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 60
    for part in (
        "100 of 2,000 rows chosen",
        "less-paper",
        "96.1 % of the trainable",
        "1.4117",
        "+0.0503",
        "word_problems",
        "13 min 33 s (estimated 11 min 42 s)",
        "12 bad, 31 duplicate, 25 cut",
        "Held-out loss is 0.0503 lower",
    ):
        assert part in re.sub(r"\s+", " ", text)
    assert "…" not in text.split("best rows")[0]  # no number is cut


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve, 数, 😀", "plain, naïve, 数, 😀"),
        ("a\u202eb", "a<U+202E>b"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("\x00\x7f\x9b", "<U+0000><U+007F><U+009B>"),
        ("a\nb\tc\r", "a<U+000A>b<U+0009>c<U+000D>"),
        ("\u2028\u2029\ufeff\u00ad\u200b", "<U+2028><U+2029><U+FEFF><U+00AD><U+200B>"),
        ("\ud800", "<U+D800>"),
        ("\U000e0041", "<U+E0041>"),
        ("👩\u200d👧", "👩\u200d👧"),  # a joiner that shapes a picture
        ("می\u200cخواهم", "می\u200cخواهم"),  # and one that Persian spelling needs
        ("pass\u200dword", "pass<U+200D>word"),  # but not one hidden in a word
        ("\u200d", "<U+200D>"),
        ("\u0600١", "\u0600١"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert texts.visible(text) == shown


def test_visible_keeps_what_it_is_told_to() -> None:
    assert texts.visible("a\n\tb\r", "\n\t") == "a\n\tb<U+000D>"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_visible_hides_nothing_and_is_stable(text: str) -> None:
    shown = texts.visible(text)
    assert texts.visible(shown) == shown
    shown.encode("utf-8")
    markup = str(texts.marked(text))
    assert not {"<script", "\x1b"} & {markup, *markup}
    assert re.sub(r'<span class="u">|</span>', "", markup).count("<") == 0


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (texts.number, 0.0616, "0.0616"),
        (texts.number, -0.04161, "−0.0416"),
        (texts.number, 0.0, "0"),
        (texts.number, 1234.5, "1,234"),
        (texts.number, 1.69e-5, "1.69e−5"),
        (texts.number, 4e-4, "0.000400"),
        (texts.number, 2.6e-7, "2.60e−7"),
        (texts.number, float("nan"), "–"),
        (texts.number, None, "–"),
        (texts.number, 0.09999, "0.100"),
        (texts.percent, 0.05, "5.0 %"),
        (texts.percent, 0.0, "0 %"),
        (texts.percent, 0.0001, "< 0.1 %"),
        (texts.percent, 1.0, "100 %"),
        (texts.percent, 0.9999, "100.0 %"),
        (texts.duration, 0.0, "0.0 s"),
        (texts.duration, 9.2, "9.2 s"),
        (texts.duration, 59.6, "1 min"),
        (texts.duration, 813.4, "13 min 33 s"),
        (texts.duration, 11520.0, "3 h 12 min"),
        (texts.duration, 190800.0, "2 d 5 h"),
        (texts.size, 512, "512 B"),
        (texts.size, 38_211_904, "38.2 MB"),
        (texts.size, 999_999, "1.0 MB"),
        (texts.size, 17.74e9, "17.7 GB"),
        (texts.signed, 0.05, "+0.0500"),
        (texts.signed, -0.00571, "−0.0057"),
    ],
)
def test_numbers_in_words(function: Any, value: float | None, text: str) -> None:
    assert function(value).replace("\u00a0", " ") == text


def test_ticks_are_round_and_inside() -> None:
    scale = charts.Scale(-0.0371, 0.1093)
    assert [tick.text for tick in charts.ticks(scale, 8)] == ["−0.02", "0.00", "0.02", "0.04", "0.06", "0.08", "0.10"]
    assert [tick.text for tick in charts.ticks(charts.Scale(0, 1000), 4)] == ["0", "500", "1,000"]
    assert len(charts.ticks(charts.Scale(2.0, 2.0))) == 1


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_of_any_range(low: float, span: float) -> None:
    found = charts.ticks(charts.Scale(low, low + span), 6)
    assert len(found) <= 16
    assert all(0 <= float(tick.at.rstrip("%")) <= 100 for tick in found)


# ---------------------------------------------------------------------------------------- a browser


class Canary(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Canary)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def browse(browser: str, page: Path, profile: Path) -> str:
    """The page's tree after it was opened and all it wanted to run has run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=3000",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, timeout=120)
    if done.returncode or b"<html" not in done.stdout:
        pytest.skip(f"{browser} does not run here: {done.stderr[-300:]!r}")
    return done.stdout.decode("utf-8", "replace")


def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path: Path, server: HTTPServer) -> None:
    """Hostile rows in each field, opened in a real browser; the same texts unescaped prove that the trap is live."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine: the report's scripts-off promise is tested on its tags only")
    host = f"127.0.0.1:{server.server_address[1]}"
    attack = (
        "</style>".join(PAYLOADS[:-2])
        .replace("//HOST", f"http://{host}")
        .replace("hit()", "document.documentElement.id='hit'")
    )
    bare = tmp_path / "bare.html"
    bare.write_text(
        f"<!doctype html><html><body>{attack.split('<a href')[0]}</style><img src=http://{host}/z></body></html>"
    )
    seen = browse(browser, bare, tmp_path / "profile")
    assert 'id="hit"' in seen[:300] and server.asked  # type: ignore[attr-defined]

    server.asked.clear()  # type: ignore[attr-defined]
    hostile_run(tmp_path / "run", attack)
    seen = browse(browser, select_page.render(tmp_path / "run"), tmp_path / "profile")
    assert 'id="hit"' not in seen[:300] and 'id="provenance"' in seen
    assert server.asked == []  # type: ignore[attr-defined]
