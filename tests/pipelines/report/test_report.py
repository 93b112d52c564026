"""The report and the summary at the end of a run: what they say, and what they refuse."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datatools.errors import DataError
from pipelines import texts
from pipelines.report import page, select_page
from pipelines.report.audit_section import arms as arms_of
from pipelines.report.scores_section import read_scores
from tests.pipelines.report.made_up import SUBTASKS, make_run, printed, words

# ---------------------------------------------------------------------------------------- a run folder, made up here


def rewrite(folder: Path, summary: dict[str, Any]) -> str:
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return select_page.render(folder).read_text(encoding="utf-8")


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
