"""Duplicates: exact counts, near ones found, and a choice that the order of rows does not change."""

import hashlib
import json
import random
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datatools import UsageError
from datatools.compact import Keys
from pipelines.rows.dedup import _bands, _jaccard, _shingles, dedup
from pipelines.rows.index import Pool
from pipelines.rows.normal import content_of, opening_of
from pipelines.rows.read import read_pool
from pipelines.rows.scan import Scan


def pool_of(tmp_path: Path, rows: list[dict], name: str = "rows.jsonl") -> Pool:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pool([tmp_path / name], cache=tmp_path, on_bad_row="skip")[0]


def scan_of(pool: Pool, ok=None) -> Scan:
    """A scan as of an encoder that loses nothing: the key is a function of the content."""
    from datatools import files

    n = len(pool)
    keys = [files.digest(repr((row.messages, row.text, row.prompt, row.completion)).encode()) for row in pool]
    ones = np.ones(n, np.int32)
    found = [(content_of(row).hex(), opening_of(row)) for row in pool]
    return Scan(
        np.ones(n, bool) if ok is None else np.asarray(ok), ones, ones, ones, Keys.of(keys), [],
        Keys.of(content for content, _ in found), np.asarray([opening for _, opening in found], np.uint64),
    )  # fmt: skip


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


LONG = "The canal was dug by hand between 1791 and 1799, and carried coal from the northern pits to the harbour."


def test_exact_duplicates_are_found_apart_from_ids(tmp_path):
    question, answer = "Où est le\n  café?", "Rue des Écoles, no. 5"
    rows = [chat(question, answer, id=f"copy-{k}") for k in range(4)]
    rows += [chat(unicodedata.normalize("NFD", question), answer), chat(question.replace("\n  ", " "), answer + "\n")]
    rows += [{"prompt": question, "completion": answer}, {"instruction": question, "output": answer}]
    others = [
        chat(question.upper(), answer),
        chat(question, answer + "6"),
        chat(answer, question),
        {"text": question + " " + answer},
    ]
    pool = pool_of(tmp_path, rows + others)
    keep, twins = dedup(pool, scan_of(pool), "exact")
    assert keep.sum() == 1 + len(others) and keep[len(rows) :].all()
    assert len(twins) == len(rows) - 1 and set(twins.values()) == {int(np.flatnonzero(keep)[0])}
    assert dedup(pool, scan_of(pool), "none").keep.all()


def test_rows_with_equal_tokens_are_duplicates(tmp_path):
    """Two rows that differ only behind the cut train the same."""
    pool = pool_of(tmp_path, [chat("q", "a long answer"), chat("q", "a long end"), chat("q", "another")])
    scan = scan_of(pool)
    scan = replace(scan, keys=Keys.of([scan.keys[0], *scan.keys[:1], scan.keys[2]]))
    keep, twins = dedup(pool, scan, "exact")
    assert keep.tolist() == [True, False, True] and twins == {1: 0}


@pytest.mark.parametrize(
    "changed",
    [
        LONG.upper(),
        LONG.replace(" ", "  ").replace(",", " ,"),
        LONG.replace("by hand", "by hand please"),
        "Please answer. " + LONG,
        LONG.replace("harbour.", "harbour !"),
    ],
)
def test_near_duplicates_are_found(tmp_path, changed):
    pool = pool_of(tmp_path, [chat(LONG, "In 1799."), chat(changed, "In 1799."), chat("Something else?", "In 1799.")])
    assert dedup(pool, scan_of(pool), "near", 0.8).keep.sum() == 2
    assert dedup(pool, scan_of(pool), "exact").keep.all()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (chat(LONG, "In 1799."), chat(LONG, "In 1899.")),  # one question, two answers
        (chat(LONG, "Yes"), chat(LONG, "No")),
        (chat(LONG, "It was finished in the year 1799."), chat(LONG, "It was finished in the year 1899.")),
        (chat("What is 3 + 4?", "7"), chat("What is 3 - 4?", "-1")),
        (chat("x + y", "a"), chat("x - y", "a")),
        (chat(LONG, "In 1799."), chat(LONG[::-1], "In 1799.")),
    ],
)
def test_rows_that_only_look_alike_are_kept(tmp_path, a, b):
    pool = pool_of(tmp_path, [a, b])
    assert dedup(pool, scan_of(pool), "near", 0.8).keep.all()


def test_threshold_is_the_share_of_pieces(tmp_path):
    other = LONG.replace("hand", "machine")
    likeness = _jaccard(_shingles(LONG + "In 1799."), _shingles(other + "In 1799."))
    pool = pool_of(tmp_path, [chat(LONG, "In 1799."), chat(other, "In 1799.")])
    assert 0.7 < likeness < 0.95
    assert dedup(pool, scan_of(pool), "near", likeness - 0.001).keep.sum() == 1
    assert dedup(pool, scan_of(pool), "near", likeness + 0.001).keep.all()
    for threshold in (0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="from 0.2 to 1"):
            dedup(pool, scan_of(pool), "near", threshold)
    with pytest.raises(UsageError, match="'fuzzy'; expected one of none, exact, near"):
        dedup(pool, scan_of(pool), "fuzzy")
    assert dedup(pool, scan_of(pool), "near", 1.0).keep.all()


@given(st.text(max_size=40), st.text(max_size=40))
def test_likeness_is_that_of_sets_of_pieces(a, b):
    def pieces(text):
        squeezed = "".join(unicodedata.normalize("NFKC", text).casefold().split())
        return {squeezed[i : i + 5] for i in range(max(1, len(squeezed) - 4))}

    want = len(pieces(a) & pieces(b)) / len(pieces(a) | pieces(b))
    assert _jaccard(_shingles(a), _shingles(b)) == pytest.approx(want)


@given(st.floats(0.2, 1))
def test_few_pairs_at_the_threshold_slip_through(threshold):
    bands, rows = _bands(threshold)
    assert bands * rows <= 128 and bands >= 2
    assert (1 - threshold**rows) ** bands <= 0.05


@pytest.mark.parametrize("how", ["exact", "near"])
def test_order_of_rows_does_not_change_the_choice(tmp_path, how):
    rng = random.Random(0)
    rows = []
    for k in range(30):
        text = f"{k} " + " ".join(rng.choices(LONG.split(), k=20))
        copies = [text, text, text.upper(), text.replace(" ", "  "), text + " now"]
        rows += [chat(copy, f"answer {k}", id=f"{k}-{c}") for c, copy in enumerate(copies)]
    kept = set()
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        pool = pool_of(tmp_path, rows, f"rows-{seed}.jsonl")
        keep, twins = dedup(pool, scan_of(pool), how, 0.8)
        assert all(keep[twin] and not keep[row] for row, twin in twins.items())
        assert set(twins) == set(np.flatnonzero(~keep).tolist())
        kept.add(tuple(sorted(pool.ids[i] for i in np.flatnonzero(keep))))
    assert len(kept) == 1
    assert len(kept.pop()) == (90 if how == "exact" else 30)


def test_rows_that_cannot_be_encoded_take_no_part(tmp_path):
    pool = pool_of(tmp_path, [chat("q", "a"), chat("q", "a"), chat("q", "a")])
    keep, twins = dedup(pool, scan_of(pool, [False, True, True]), "near")
    assert keep[0] and keep.sum() == 2 and len(twins) == 1 and 0 not in twins.values()


def test_many_alike_rows_take_linear_time(tmp_path):
    """One long wording, other answers: no duplicate, though every row is like every other."""
    rows = [chat(LONG * 3 + f" {k}", hashlib.md5(b"%d" % k).hexdigest()) for k in range(600)]
    pool = pool_of(tmp_path, rows)
    start = time.process_time()
    keep = dedup(pool, scan_of(pool), "near").keep
    assert keep.all() and time.process_time() - start < 20


def test_twenty_thousand_rows(tmp_path):
    pool = pool_of(tmp_path, [{"prompt": f"question {k % 15_000}", "completion": "yes"} for k in range(20_000)])
    start = time.process_time()
    keep, twins = dedup(pool, scan_of(pool), "exact")
    assert keep.sum() == 15_000 and len(twins) == 5_000
    assert time.process_time() - start < 20
