"""`datatools explain`: every method that compares with target rows, rows that were left out, texts as they are."""

import json

import pyarrow.parquet as pq
import pytest

from datatools import AGGREGATIONS, DataError, UsageError
from pipelines.cli.app import main
from pipelines.select import explain
from pipelines.select import run as select
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.methods import known
from pipelines.settings.parts import DataConfig
from pipelines.settings.select import FeaturesConfig


def scores(run):
    return pq.read_table(run / "scores.parquet").to_pylist()


def explained(run, row, nearest=1):
    return explain.run(ExplainConfig(file=run / "selected.jsonl", row=row, nearest=nearest))


@pytest.fixture(scope="module")
def alike(world, tmp_path_factory):
    """A run whose rows were chosen by their words."""
    return select.run(world.select(tmp_path_factory.mktemp("explain") / "tfidf", method="tfidf"))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "less", "features": FeaturesConfig(method="vmap"), "aggregate": "paper"},
        {"method": "less", "features": FeaturesConfig(method="loop"), "aggregate": "round_robin"},
        {"method": "rds"},
        *({"method": "tfidf", "aggregate": how} for how in AGGREGATIONS),
    ],
    ids=lambda changes: "-".join(str(getattr(value, "method", value)) for value in changes.values()),
)
def test_the_nearest_target_row_is_the_run_s(world, tmp_path, changes, capsys):
    """Of the first chosen row, and of the best and the worst row that were not chosen."""
    run = select.run(world.select(tmp_path / "run", **changes))
    table = sorted(scores(run), key=lambda row: row["_rank"])
    left_out = [row for row in table if not row["_selected"]]
    for row in (table[0], left_out[0], left_out[-1]):
        found = explained(run, row["_id"])
        assert found["targets"][0]["id"] == row["_nearest"]
        assert found["targets"][0]["similarity"] == pytest.approx(row["_nearest_similarity"], abs=1e-4)
        assert (found["selected"], found["rank"]) == (row["_selected"], row["_rank"])
        assert bool(found["layers"]) == (changes["method"] == "less")
        shown = capsys.readouterr().out
        assert f"rank {row['_rank']} of 60" in shown and row["_nearest"] in shown
        assert ("not chosen by" in shown) != row["_selected"]


@pytest.mark.parametrize("method", ["loss", "random", "random-length"])
def test_methods_without_target_rows_say_so(world, tmp_path, method, capsys):
    run = select.run(world.select(tmp_path / "run", method=method))
    for line in (1, 6):
        found = explain.run(ExplainConfig(file=run / "selected.jsonl", line=line))
        assert found["targets"] == found["layers"] == [] and "target" not in known(method).needs
    shown = " ".join(capsys.readouterr().out.split())
    assert ("looks at no target rows" if method == "loss" else "at random") in shown and "--target" not in shown


@pytest.mark.parametrize("name", ["whole", "name", "id"])
def test_a_row_is_named_by_its_place_or_by_its_id(world, alike, name):
    row = next(row for row in scores(alike) if not row["_selected"])
    given = {"whole": f"{row['_file']}:{row['_line']}", "name": f"pool.jsonl:{row['_line']}", "id": row["_id"]}[name]
    found = explained(alike, given)
    assert (found["id"], found["where"]) == (row["_id"], f"{world.pool}:{row['_line']}")


@pytest.mark.parametrize("row, words", [
    ("pool.jsonl:61", "the pool has no such row"), ("nobody", "neither the id"), ("other.jsonl:1", "neither the id"),
])  # fmt: skip
def test_a_row_that_is_not_there_is_named(alike, row, words):
    with pytest.raises(UsageError, match=words):
        explained(alike, row)


def test_rows_that_could_not_be_chosen_say_why(own_world, tmp_path, capsys):
    lines = own_world.pool.read_text().splitlines()
    copy = {**json.loads(lines[0]), "id": "copy"}
    twice = {**json.loads(lines[3]), "id": "a:7"}
    twice["messages"][0]["content"] = "first line\nsecond line \u202e"
    own_world.pool.write_text("\n".join([*lines, json.dumps(copy), "{", json.dumps(twice)]) + "\n")
    pool = DataConfig(paths=[str(own_world.pool)], dedup="exact", on_bad_row="skip")
    run = select.run(own_world.select(tmp_path / "run", method="tfidf", train=pool))
    assert explained(run, "copy")["targets"] == []
    assert "repeats another row" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"pool.jsonl:62: never scored.*truncated_json"):
        explained(run, "pool.jsonl:62")
    explained(run, "a:7")
    assert "first line\nsecond line <U+202E>\n" in capsys.readouterr().out
    own_world.pool.write_text(own_world.pool.read_text() + json.dumps({**twice, "id": "new", "text": "n"}) + "\n")
    with pytest.raises(DataError, match="was not in the pool"):
        explained(run, "new")


def test_damaged_scores_are_named(world, tmp_path):
    run = select.run(world.select(tmp_path / "run", method="random"))
    whole = pq.read_table(run / "scores.parquet")
    for table in (whole.drop_columns(["_rank"]), whole.set_column(8, "_selected", [["yes"] * 60])):
        pq.write_table(table, run / "scores.parquet")
        with pytest.raises(DataError, match=r"scores.parquet is damaged.*again"):
            explained(run, "a-3")
    (run / "scores.parquet").unlink()
    with pytest.raises(UsageError, match="no scores yet"):
        explained(run, "a-3")


def test_the_command_takes_a_run_and_a_row(alike, world, capsys):
    chosen = f"{alike}/selected.jsonl"
    for arguments in ([f"{chosen}:1"], [alike, "selected.jsonl:1"], [chosen, "a-5"], [alike, f"{world.pool}:6"]):
        assert main(["explain", *map(str, arguments), "--nearest", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("target rows that it is most like") == 4 and out.count("pool.jsonl:6  ") == 2
    assert main(["explain", f"{world.pool}:6"]) == 2
    assert f"datatools explain DIR {world.pool}:6" in capsys.readouterr().err
