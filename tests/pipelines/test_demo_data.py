"""The demo's instruction set is what its generator says, is sound, and is nobody else's."""

import ast
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from datatools import UsageError
from pipelines.demo_data import make
from pipelines.demo_data.bookings import POOL_CITIES, TARGET_CITIES
from pipelines.demo_data.examples import MONTHS

NAMES = ("pool.jsonl", "target.jsonl", "test.jsonl")
LINE = re.compile(r"city: ([A-Z]\w+) \| day: (\d{1,2}) ([A-Z][a-z]{2}) \| cost: (\d+) (EUR|USD|GBP|CHF|JPY)")
SIGNS = {
    "€": "EUR",
    "euros": "EUR",
    "$": "USD",
    "dollars": "USD",
    "£": "GBP",
    "pounds": "GBP",
    "francs": "CHF",
    "Swiss francs": "CHF",
    "¥": "JPY",
    "yen": "JPY",
}


def rows(name):
    return [json.loads(line) for line in (make.FOLDER / name).read_text(encoding="utf-8").splitlines()]


def turns(row):
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def normal(text):
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def shingles(row):
    """Triples of words of the whole row."""
    words = normal(" ".join(turns(row))).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def similarity(a, b):
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_what_the_generator_writes(name):
    assert (make.FOLDER / name).read_bytes() == make.contents()[name], "run python -m pipelines.demo_data.make"


def test_write_writes_the_same_bytes_elsewhere(tmp_path):
    make.write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.jsonl")} == make.contents()


def test_a_copy_to_try_the_readme_on_replaces_nothing(tmp_path):
    make.copy(tmp_path / "new")
    wanted = {name.replace("target", "dev"): data for name, data in make.contents().items()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == wanted
    (tmp_path / "dev.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"dev\.jsonl exists already; move it, or name another folder"):
        make.copy(tmp_path)
    assert [p.name for p in tmp_path.glob("*.jsonl")] == ["dev.jsonl"]
    assert (tmp_path / "dev.jsonl").read_text() == "mine"


def test_counts():
    pool, target, test = (rows(name) for name in NAMES)
    assert (len(pool), len(target), len(test)) == (240, 8, 40)
    assert Counter(row["dataset"] for row in pool) == make.SOURCES
    assert Counter(row["subtask"] for row in target) == {"stay": 4, "ticket": 4}
    assert Counter(row["subtask"] for row in test) == {"stay": 20, "ticket": 20}


def test_readme_tells_the_same_counts():
    text = (make.FOLDER / "README.md").read_text()
    table = {source: int(n) for source, n in re.findall(r"^\| (\w+) \| (\d+) \|", text, re.MULTILINE)}
    assert table == make.SOURCES
    relevant = Counter(row["dataset"] for row in rows("pool.jsonl") if row["id"] in make.relevant_ids())
    said = {source: int(n) for source, n in re.findall(r"^\| (\w+) \| \d+ \| (\d+) relevant", text, re.MULTILINE)}
    assert said == relevant


def test_rows_are_valid():
    everything = [row for name in NAMES for row in rows(name)]
    assert len({row["id"] for row in everything}) == len(everything)
    for row in everything:
        keys = {"dataset", "id", "messages"} | ({"subtask"} if row["dataset"] == "bookings" else set())
        assert row.keys() == keys
        for text in turns(row):
            assert text == text.strip() and text, row["id"]
            assert not re.search(r"\{[cdp]?\}|<\|", text), f"{row['id']}: an unfilled slot or a control token"


def test_relevant_rows_are_a_tenth_and_their_sources_teach_other_things_too():
    pool = rows("pool.jsonl")
    truth = make.relevant_ids()
    assert truth <= {row["id"] for row in pool}
    assert 0.08 <= len(truth) / len(pool) <= 0.12
    inside = Counter(row["dataset"] for row in pool if row["id"] in truth)
    assert len(inside) >= 2
    assert all(2 * n < 1.2 * make.SOURCES[source] for source, n in inside.items())
    assert truth == {row["id"] for row in pool if LINE.fullmatch(turns(row)[1])}  # no decoy has the target's format


def test_booking_lines_agree_with_their_sentences():
    """City, day, month, amount and currency are read back from the request, independently of the generator."""
    bookings = [row for row in rows("pool.jsonl") if row["id"] in make.relevant_ids()]
    bookings += rows("target.jsonl") + rows("test.jsonl")
    amount = re.compile(r"([€$£¥])(\d+)|(\d+) (euros|dollars|pounds|Swiss francs|francs|yen)")
    month = "|".join(MONTHS)
    date = re.compile(rf"(\d{{1,2}})(?:st|nd|rd|th)? ({month})|({month}) (\d{{1,2}})\b")
    for row in bookings:
        user, answer = turns(row)
        city, day, short, cost, currency = LINE.fullmatch(answer).groups()
        assert city in user
        (money,) = amount.findall(user)
        assert (money[1] or money[2], SIGNS[money[0] or money[3]]) == (cost, currency), row["id"]
        found = [(a or d, b or c) for a, b, c, d in date.findall(user)]
        assert [(n, name[:3]) for n, name in found] == [(day, short)], row["id"]


def test_arithmetic_is_right():
    def value(node):
        match node:
            case ast.Constant():
                return node.value
            case ast.BinOp():
                a, b = value(node.left), value(node.right)
                return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b, ast.Div: a / b}[type(node.op)]
        raise AssertionError(ast.dump(node))

    equation = re.compile(r"([(\d][\d.()+*/x -]*[\d)]) = (\d+(?:\.\d+)?)")
    found = [
        (row["id"], left, right)
        for row in rows("pool.jsonl")
        if row["dataset"] in ("arithmetic", "units")
        for left, right in equation.findall(turns(row)[1])
    ]
    assert len(found) > 30
    for name, left, right in found:
        assert value(ast.parse(left.replace("x", "*"), mode="eval").body) == pytest.approx(float(right)), (name, left)


def test_python_and_json_answers_parse():
    for row in rows("pool.jsonl"):
        user, answer = turns(row)
        if row["dataset"] == "code" and "Python" in user:
            ast.parse(answer)
        if "JSON" in user and row["dataset"] == "records":
            assert isinstance(json.loads(answer), dict)


def test_the_pool_has_five_duplicates_and_one_long_row():
    pool = [(row["id"], shingles(row)) for row in rows("pool.jsonl")]
    pairs = [similarity(a, b) for i, (_, a) in enumerate(pool) for _, b in pool[:i]]
    assert sum(s == 1 for s in pairs) == 3
    assert sum(0.8 <= s < 1 for s in pairs) == 2
    assert not [s for s in pairs if 0.6 <= s < 0.8]
    words = sorted(len(" ".join(turns(row)).split()) for row in rows("pool.jsonl"))
    assert words[-1] > 150 and words[-2] < 40


def test_target_and_test_are_new():
    """No text of theirs is in the pool, no city of theirs in a relevant row, and no two are near duplicates."""
    pool, target, test = (rows(name) for name in NAMES)
    known = {normal(text) for row in pool for text in turns(row)}
    assert not [row["id"] for row in target + test for text in turns(row) if normal(text) in known]
    assert not {c for c, _ in POOL_CITIES} & {c for c, _ in TARGET_CITIES}
    sets = [shingles(row) for row in target + test]
    assert max(similarity(a, b) for i, a in enumerate(sets) for b in sets[:i]) < 0.5
    assert max(similarity(a, shingles(row)) for a in sets for row in pool) < 0.5
    assert len({normal(turns(row)[1]) for row in target + test}) == 48


def test_no_row_comes_from_the_shared_data(shared):
    folder = Path(shared) / "data"
    paths = sorted(folder.rglob("*.jsonl"))
    if not paths:
        pytest.skip(f"no data files in {folder}")
    users, long_answers = set(), set()
    for path in paths:
        for line in path.read_bytes().split(b"\n"):
            try:
                messages = json.loads(line)["messages"]
                texts = [normal(m["content"]) for m in messages]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # dirty.jsonl holds broken lines on purpose
            users.update(texts[:1])
            long_answers.update(text for text in texts[1:] if len(text) >= 30)  # "15:20" may well occur elsewhere
    assert len(users) > 100
    ours = [(row["id"], *map(normal, turns(row))) for name in NAMES for row in rows(name)]
    assert not [name for name, user, answer in ours if user in users or answer in long_answers]
