"""`datatools select` from end to end on a tiny model: what it writes and refuses, and that a kill changes nothing."""

import json
import math
import random
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optim
import pipelines.select.gradients
from datatools import DataError, GradientFeatures, UsageError, files
from pipelines.models import load as models
from pipelines.models import losses
from pipelines.models.adapters import load_adapter
from pipelines.models.losses import row_losses
from pipelines.rows.prepare import prepare
from pipelines.runs import provenance
from pipelines.select import explain, write
from pipelines.select import run as select
from pipelines.select.columns import column
from pipelines.select.scorer import scorer
from pipelines.settings.dump import dump
from pipelines.settings.load import load_config
from pipelines.settings.methods import SCORERS, known
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.select import ExplainConfig, FeaturesConfig, SelectConfig, WarmupConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import checkpoints, train
from tests.pipelines.conftest import make_world
from tests.processes import spawn
from tests.tiny import save_tiny_model, write_rows

REPOSITORY = Path(__file__).resolve().parents[3]


def hashes(folder):
    """Relative path -> hash of every file below `folder`."""
    return {str(p.relative_to(folder)): files.digest_file(p) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def outcome(run):
    """What must not depend on luck: the selection, the scores, and every byte of the feature stores."""
    return {
        "selected": (run / "selected.jsonl").read_bytes(),
        "scores": files.digest_file(run / "scores.parquet"),
        "table": files.digest_file(run / "selected.parquet"),
        **hashes(run / "features"),
    }


def scores(run):
    return pq.read_table(run / "scores.parquet").to_pydict()


def rows_in(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def ids(run):
    return [row["id"] for row in rows_in(run / "selected.jsonl")]


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """The run that others are compared with."""
    return select.run(world.select(tmp_path_factory.mktemp("runs") / "first"))


@pytest.fixture
def counted(monkeypatch):
    """How many rows' gradients are computed: a one-element list that counts."""
    inner, total = pipelines.select.gradients.extract, [0]

    def extract(*args, advance, **options):
        def count(rows, tokens):
            total[0] += rows
            advance(rows, tokens)

        return inner(*args, advance=count, **options)

    monkeypatch.setattr(pipelines.select.gradients, "extract", extract)
    return total


# ------------------------------------------------------------------------------------------------------ what it writes


def test_everything_that_is_promised_is_there(first):
    present = set(hashes(first))
    assert {
        "run.yaml",
        "provenance.json",
        "progress.json",
        "events.jsonl",
        "scores.parquet",
        "selected.jsonl",
        "selected.parquet",
        "summary.json",
        "report.html",
    } <= present
    for step in (4, 8):
        assert {
            f"features/train-{step}/plan.json",
            f"features/target-{step}/part-00000.json",
            f"warmup/checkpoint-{step}/complete.json",
            f"warmup/checkpoint-{step}/optimizer.pt",
            f"warmup/checkpoint-{step}/adapter_model.safetensors",
        } <= present
    assert not [name for name in present if ".tmp" in name or name.endswith(".lock")]


def test_columns_of_the_scores(first, world):
    schema = pq.read_schema(first / "scores.parquet")
    assert {f.name: str(f.type) for f in schema} == {
        "_id": "string",
        "_source": "string",
        "_file": "string",
        "_line": "int64",
        "_key": "string",
        "_tokens": "int32",
        "_supervised": "int32",
        "_status": "string",
        "_score": "float",
        "_rank": "int64",
        "_selected": "bool",
        "_nearest": "string",
        "_nearest_similarity": "float",
        "_norm": "float",
        "subtask:target": "float",
    }
    table = scores(first)
    assert table["_line"] == list(range(1, 61)) and set(table["_file"]) == {str(world.pool)}
    order = sorted(range(60), key=lambda i: table["_rank"][i])
    assert [table["_rank"][i] for i in order] == list(range(1, 61))
    assert [table["_score"][i] for i in order] == sorted(table["_score"], reverse=True)
    assert [table["_id"][i] for i in order[:6]] == ids(first)
    assert [i for i in range(60) if table["_selected"][i]] == sorted(order[:6])
    assert set(table["_nearest"]) <= {"t-500", "t-501", "t-502"}
    assert all(near >= score - 1e-6 for near, score in zip(table["_nearest_similarity"], table["_score"], strict=True))


def test_columns_of_the_selection(first):
    table = pq.read_table(first / "selected.parquet").to_pydict()
    assert list(table) == ["dataset", "id", "messages", "_id", "_source", "_score", "_rank", "_weight", "_why"]
    assert table["id"] == table["_id"] == ids(first) and table["_rank"] == [1, 2, 3, 4, 5, 6]
    assert all(why.startswith("most similar to target row t-50") for why in table["_why"])


def test_summary_and_provenance(first, world):
    summary = json.loads((first / "summary.json").read_text())
    assert summary["formula"]["name"] == "less-paper" and "adamw(betas=(0.9, 0.999)" in summary["formula"]["notes"][0]
    assert summary["pool"]["rows"] == 60 and summary["budget"] == {
        "asked": "10%",
        "rows": 6,
        "tokens": summary["budget"]["tokens"],
    }
    assert sum(c["weight"] for c in summary["checkpoints"]) == pytest.approx(1)
    assert [c["step"] for c in summary["checkpoints"]] == [4, 8]
    stored = sum(p.stat().st_size for p in (first / "features").rglob("*") if p.is_file())
    assert summary["cost"]["after"]["bytes"] == stored
    assert summary["model"]["seen_share"] == 1.0 and summary["model"]["unseen"] == []
    provenance = json.loads((first / "provenance.json").read_text())
    assert provenance["facts"]["data"] == {
        str(world.pool): f"{files.digest_file(world.pool)}, {world.pool.stat().st_size} bytes"
    }
    weights = world.model / "model.safetensors"
    assert provenance["facts"]["model"]["model.safetensors"] == files.digest_file(weights)
    chosen = [key for key, yes in sorted(zip(scores(first)["_key"], scores(first)["_selected"], strict=True)) if yes]
    assert provenance["selection"]["rows"] == 6 and len(chosen) == 6


ODD_LINES = [
    b'{"messages": [{"role": "user", "content": "a BOM before"}, {"role": "assistant", "content": "yes"}]}',
    b'{"id":"crlf","messages":[{"content":"order of keys","role":"user"},{"content":"odd","role":"assistant"}]}\r',
    '{"z": 1e2, "id": "ünï", "messages": [{"role": "user", "content": "Grüße, \u2028 and 🙂"},'
    ' {"role": "assistant", "content": "e\u0301 is not é, \u202e neither"}]}'.encode(),
    b'  {"id" : "spaces" ,"prompt":"p", "completion":"\\u00e9\\ud83d\\ude42 escaped", "meta":{}, "n": 10}\t ',
    b'{"id": "nested", "text": "plain text", "meta": {"a": [], "b": [{}], "c": null}, "n": "one", "_x": 3}',
    b'{"id": "pair", "prompt": "p ", "completion": "c", "meta": [1, "two"], "n": 1.5}',
    b'{"id": "pair2", "prompt": "p ", "completion": "d", "meta": {"a": 1}, "n": true}',
]


@pytest.mark.parametrize("method", ["random", "less"])
def test_selected_lines_are_the_pool_s_byte_for_byte(world, tmp_path, method):
    """No parsing and writing again: key order, escapes, spaces, CR and normal forms stay; so does reading them."""
    pool = tmp_path / "odd.jsonl"
    pool.write_bytes(b"\xef\xbb\xbf" + b"\n".join(ODD_LINES))  # the mark is the file's, not the row's; no last newline
    run = select.run(world.select(tmp_path / "run", train=DataConfig(paths=[str(pool)]), method=method, budget="100%"))
    written = (run / "selected.jsonl").read_bytes()
    assert written.endswith(b"\n")
    assert sorted(written.removesuffix(b"\n").split(b"\n")) == sorted(ODD_LINES)
    again = select.run(
        world.select(
            tmp_path / "again", train=DataConfig(paths=[str(run / "selected.jsonl")]), method=method, budget="100%"
        )
    )
    assert sorted((again / "selected.jsonl").read_bytes().split(b"\n")) == sorted(written.split(b"\n"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_VALUES, min_size=1, max_size=4))
def test_any_column_can_be_written(tmp_path_factory, values):
    """selected.parquet takes whatever JSON rows bring: empty objects, mixed types, whole numbers beyond 64 bits."""
    path = tmp_path_factory.mktemp("any") / "t.parquet"
    write._write_table(path, {"x": column(values)})
    assert pq.read_table(path).num_rows == len(values)


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.slow
def test_another_process_in_another_world_selects_the_same(first, world, tmp_path):
    """One seed fixes everything: hash seed, locale, temporary folder and module entry point change nothing."""
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *world.argv("select", out=tmp_path / "run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "77",
            "TMPDIR": str(tmp_path / "tmp"),
            "LC_ALL": "C",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n"
    assert outcome(tmp_path / "run") == outcome(first)


def test_the_order_of_rows_and_files_does_not_change_the_selection(first, world, tmp_path):
    """Ties, the warm-up's sample and the units go by content: a shuffled pool in two files is the same pool."""
    lines = world.pool.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:25]))
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[25:]))
    pool = DataConfig(paths=[str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    run = select.run(world.select(tmp_path / "run", train=pool))
    assert ids(run) == ids(first)
    assert hashes(run / "features") == hashes(first / "features")


def test_a_run_that_is_done_computes_nothing_again(first, world, counted):
    before = outcome(first)
    stores = {p: p.stat().st_mtime_ns for p in (first / "features").rglob("*") if p.is_file()}
    select.run(world.select(first))
    assert counted == [0] and outcome(first) == before
    assert {p: p.stat().st_mtime_ns for p in stores} == stores


def test_random_numbers_of_the_caller_are_left_alone(world, tmp_path):
    """Sampling has generators of its own; a user's torch.manual_seed keeps its meaning."""
    for method in ("random", "random-length", "tfidf", "rds", "loss"):
        torch.manual_seed(5)
        random.seed(5)
        state = torch.get_rng_state(), random.getstate()
        select.run(world.select(tmp_path / method, method=method))
        assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(command, tmp_path, record_property):
    """kill -9 at moments drawn uniformly over the run, restarted with the same command until it is done."""
    big = make_world(tmp_path / "world")
    write_rows(big.pool, 200)
    argv = big.argv("select", "--epochs", 1, "--set", "warmup.max_steps=2", out=tmp_path / "whole")
    argv += ["--set", "features.token_budget=48", "--set", "features.rows_per_unit=10"]
    whole = command(*argv)
    assert whole.code == 0
    want, units = outcome(tmp_path / "whole"), 200 // 10
    rng, kills, lives, stages, seconds = random.Random(0), 0, 0, Counter(), whole.seconds
    while kills < 10:
        lives += 1
        run, started = tmp_path / f"life-{lives}", False
        argv[argv.index("--out") + 1] = str(run)
        while True:
            answer = command(*argv, kill_after=rng.random() * seconds)
            if answer.code == 0:
                # what the next life is drawn from follows the machine's load
                seconds = answer.seconds if not started else max(seconds, answer.seconds)
                break
            assert answer.code == -9, answer.stderr
            kills, started = kills + 1, True
            parts = len(list(run.glob("features/train-*/part-*.json")))
            stages["features" if 0 < parts < units else "after" if parts else "before"] += 1
        assert outcome(run) == want, f"life {lives} differs"
    record_property("kills", kills)
    print(f"{kills} kills in {lives} lives, {dict(stages)}; 0 differing files of {len(want)}")
    assert stages["features"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, count, when",
    [
        ("pipelines.training.trainer:mark_complete", 2, "before"),
        ("transformers:Trainer._save_rng_state", 1, "before"),
        ("datatools.files.atomic:_commit", 20, "before"),
        ("datatools.features.store:GradientFeatures.write_unit", 3, "after"),
        ("pipelines.select.write:_write_table", 1, "after"),
        ("pipelines.report.select_page:render", 1, "before"),
    ],
)
def test_killed_at_an_instrumented_point_twice(command, first, world, tmp_path, where, count, when):
    """Inside a save, before a commit, between two result files: the second kill finds what the first left behind."""
    argv = world.argv("select", out=tmp_path / "run")
    for _ in range(2):
        assert command(*argv, die=[where, count, when]).code == -9
        count = 1
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    assert outcome(tmp_path / "run") == outcome(first)


@pytest.mark.parametrize("step", [4, 8])
def test_a_damaged_warm_up_checkpoint_is_made_again(first, world, tmp_path, counted, step):
    """Also one in the middle: scores over fewer checkpoints than before would be another result, silently."""
    run = shutil.copytree(first, tmp_path / "run")
    path = run / "warmup" / f"checkpoint-{step}" / "optimizer.pt"
    flip(path, path.stat().st_size // 2)
    select.run(world.select(run))
    assert (run / "warmup" / f"checkpoint-{step}.broken").is_dir()
    assert outcome(run) == outcome(first) and counted == [0]


def test_a_damaged_feature_file_is_computed_again(first, world, tmp_path, counted):
    run = shutil.copytree(first, tmp_path / "run")
    flip(run / "features" / "train-4" / "part-00001.safetensors", 900)
    select.run(world.select(run))
    for path in run.rglob("*.broken"):
        path.unlink()
    assert outcome(run) == outcome(first) and counted == [16]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------- a changed world


def change_weights(world):
    path = world.model / "model.safetensors"
    flip(path, path.stat().st_size - 7)


def change_template(world):
    path = world.model / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def change_pool(world):
    world.pool.write_bytes(world.pool.read_bytes().replace(b"question 7 ", b"question 8 "))


def change_target(world):
    world.target.write_bytes(world.target.read_bytes() + world.test.read_bytes())


@pytest.mark.parametrize(
    "change, name",
    [
        (change_weights, "model.model.safetensors was"),
        (change_template, "encoding.template was"),
        (change_pool, "data.{pool} was"),
        (change_target, "target.{target} was"),
    ],
)
def test_a_changed_world_is_refused_by_name(own_world, tmp_path, change, name, monkeypatch):
    """Half a run on one model and half on another is no run: what changed is named, with how to go on."""
    stopped_after_warm_up(own_world, tmp_path / "run", monkeypatch)
    change(own_world)
    with pytest.raises(DataError, match="changed since the run") as refused:
        select.run(own_world.select(tmp_path / "run"))
    assert name.format(pool=own_world.pool, target=own_world.target) in str(refused.value)
    assert "--accept-change" in str(refused.value) and "--overwrite" in str(refused.value)


def stopped_after_warm_up(world, run, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(pipelines.select.gradients, "extract", stop)
        select.run(world.select(run))


def test_an_accepted_change_costs_what_changed(own_world, tmp_path, counted):
    """Two more target rows, accepted by name: their gradients are computed, nothing else, and it is written down."""
    select.run(own_world.select(tmp_path / "run"))
    before, counted[0] = scores(tmp_path / "run")["_score"], 0
    own_world.target.write_bytes(
        own_world.target.read_bytes() + b"\n".join(own_world.test.read_bytes().split(b"\n")[:2])
    )
    run = select.run(own_world.select(tmp_path / "run", accept_change=["target"]))
    assert counted == [2 * 2] and scores(run)["_score"] != before
    changed = json.loads((run / "provenance.json").read_text())["changed"]
    assert [entry["what"] for entry in changed] == [f"target.{own_world.target}"]


def test_an_accepted_model_is_a_new_run_and_going_back_is_one_again(own_world, tmp_path):
    """Warm-up, features and scores are all of one model, whichever it is; what was made before is kept beside."""
    first = outcome(select.run(own_world.select(tmp_path / "run")))
    for attempt in (1, 2):
        change_weights(own_world)  # there and back: the same bit
        with pytest.raises(DataError, match="model.safetensors was .*--accept-change model"):
            select.run(own_world.select(tmp_path / "run"))
        run = select.run(own_world.select(tmp_path / "run", accept_change=["model"]))
        fresh = first if attempt == 2 else outcome(select.run(own_world.select(tmp_path / "fresh")))
        assert outcome(run) == fresh and (run / f"before-change-{attempt}" / "selected.jsonl").is_file()
    select.run(own_world.select(tmp_path / "run"))
    assert not (tmp_path / "run" / "before-change-3").exists()


def test_features_of_other_code_are_computed_again_once_that_is_accepted(own_world, tmp_path, counted, monkeypatch):
    run = select.run(own_world.select(tmp_path / "run"))
    monkeypatch.setattr(provenance, "code_digest", lambda: "f" * 32)
    monkeypatch.setattr(pipelines.select.gradients, "FEATURE_VERSION", 99)
    before, counted[0] = counted[0], 0
    select.run(own_world.select(run, accept_change=["code"]))
    assert counted == [before] and (run / "features" / "train-4.old-1").is_dir()


@pytest.mark.parametrize("setting, value", [("seed", 1), ("lora", LoraConfig(rank=3))])
def test_other_settings_are_refused_by_name(first, world, setting, value):
    with pytest.raises(UsageError, match=rf"other settings: {setting}"):
        select.run(world.select(first, **{setting: value}))


def test_features_of_other_weights_are_refused_even_if_the_change_is_accepted(own_world, tmp_path, monkeypatch):
    """`--accept-change model` lets the run go on, but the store does not mix features of two models."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    select.run(own_world.select(tmp_path / "a", features=shared))
    change_weights(own_world)
    with pytest.raises(DataError, match=r"made differently: .*model.safetensors was"):
        select.run(own_world.select(tmp_path / "a", features=shared, accept_change=["model"]))


def test_a_grown_pool_costs_its_new_rows(own_world, tmp_path, counted):
    """1 % more rows: the warm-up stays, old units stay to the byte, only the new rows are computed."""
    write_rows(own_world.pool, 200)
    run = select.run(own_world.select(tmp_path / "run"))
    assert counted == [2 * (200 + 3)]
    before = {name: digest for name, digest in hashes(run).items() if "/part-" in name or name.startswith("warmup/")}
    old = scores(run)
    counted[0] = 0
    write_rows(tmp_path / "more.jsonl", 2, start=200)
    own_world.pool.write_bytes(own_world.pool.read_bytes() + (tmp_path / "more.jsonl").read_bytes())
    select.run(own_world.select(tmp_path / "run"))
    assert counted == [2 * 2]
    after = hashes(run)
    assert {name: after.get(name) for name in before} == before
    new = scores(run)
    assert len(new["_id"]) == 202 and new["_score"][:200] == old["_score"] and None not in new["_score"]
    assert len(ids(run)) == 20
    changed = json.loads((run / "provenance.json").read_text())["changed"]
    assert [entry["what"] for entry in changed] == [f"data.{own_world.pool}"]
    counted[0] = 0
    select.run(own_world.select(tmp_path / "run"))  # and the grown run is a run like any other
    assert counted == [0] and scores(run) == new


# ------------------------------------------------------------------------------------------------- budgets and methods


def test_budgets_in_rows_shares_and_tokens(world, tmp_path):
    for budget, rows in (("7", 7), ("25%", 15), ("5%", 3)):
        assert len(ids(select.run(world.select(tmp_path / budget, method="loss", budget=budget)))) == rows
    run = select.run(world.select(tmp_path / "tokens", method="loss", budget="700 tokens"))
    table = scores(run)
    used = sum(n for n, yes in zip(table["_tokens"], table["_selected"], strict=True) if yes)
    left = [n for n, yes in zip(table["_tokens"], table["_selected"], strict=True) if not yes]
    assert used <= 700 and used + min(left) > 700, "no further row fits"


def test_a_cap_on_sources(world, tmp_path):
    free = select.run(world.select(tmp_path / "free", method="tfidf", budget="12"))
    capped = select.run(world.select(tmp_path / "capped", method="tfidf", budget="12", max_per_source=4))
    assert Counter(row["dataset"] for row in rows_in(capped / "selected.jsonl")) == {"a0": 4, "a1": 4, "a2": 4}
    order = [i for i in ids(free) if i in ids(capped)]
    assert [i for i in ids(capped) if i in order] == order, "within a source the best come first, as without a cap"


@pytest.mark.parametrize("method", ["less", "random"])
def test_exact_duplicates_are_chosen_once(own_world, tmp_path, method):
    """Rows of equal text under other ids: one is kept, the others have the status `duplicate` and no score."""
    lines = [json.loads(line) for line in own_world.pool.read_text().splitlines()]
    copies = [{**row, "id": f"copy-{row['id']}"} for row in lines[:10]]
    own_world.pool.write_text("".join(json.dumps(row) + "\n" for row in [*copies, *lines]))
    pool = DataConfig(paths=[str(own_world.pool)], dedup="exact")
    run = select.run(own_world.select(tmp_path / "run", train=pool, method=method, budget="60"))
    table = scores(run)
    assert Counter(table["_status"]) == {"ok": 60, "duplicate": 10}
    dropped = [i for i, state in enumerate(table["_status"]) if state == "duplicate"]
    assert not any(table["_selected"][i] or table["_score"][i] is not None for i in dropped)
    contents = [row["messages"][0]["content"] for row in rows_in(run / "selected.jsonl")]
    assert len(contents) == len(set(contents)) == 60


def test_copies_that_are_kept_have_one_score(own_world, tmp_path, counted):
    """Without deduplication a copy is computed once, scored like its twin, and the report warns of it."""
    lines = [json.loads(line) for line in own_world.pool.read_text().splitlines()]
    copies = [{**row, "id": f"copy-{row['id']}"} for row in lines[:10]]
    own_world.pool.write_text("".join(json.dumps(row) + "\n" for row in [*lines, *copies]))
    run = select.run(own_world.select(tmp_path / "run", budget="100%"))
    table = scores(run)
    assert table["_score"][:10] == table["_score"][60:] and counted == [2 * 63]
    assert any("repeat the content" in text for text in json.loads((run / "summary.json").read_text())["warnings"])


@pytest.mark.parametrize("method", sorted(set(SCORERS) - {"less"}))
def test_every_method_writes_the_same_files(world, tmp_path, method):
    target = [] if method in ("random", "loss") else [str(world.target)]
    run = select.run(world.select(tmp_path / "run", method=method, target=target))
    assert len(ids(run)) == 6 and (run / "report.html").stat().st_size > 1000
    table, summary = scores(run), json.loads((run / "summary.json").read_text())
    assert summary["method"] == method and summary["audit"] is None
    scored = method not in ("random", "random-length")
    assert all((value is not None) == scored for value in table["_score"])
    assert all((value is not None) == (scorer(method).nearest is not None) for value in table["_nearest"])
    if scored and known(method).selector == "top_k":
        taken = [score for score, selected in zip(table["_score"], table["_selected"], strict=True) if selected]
        assert sorted(taken) == sorted(table["_score"])[-6:], "several rows can have the score of the last one"
    trained = "gradients" in known(method).needs
    assert (run / "warmup").exists() == trained and any(run.glob("features/*train-*")) == trained


def test_losses_are_the_model_s(world, tmp_path):
    """--method loss: the mean over supervised tokens that plain torch gives, row by row."""
    run = select.run(world.select(tmp_path / "run", method="loss"))
    loaded = models.load(ModelConfig(name=str(world.model)))
    for row, score in list(zip(rows_in(world.pool), scores(run)["_score"], strict=True))[:5]:
        text = loaded.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        encoded = loaded.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        start = text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
        end = text.rindex("<|im_end|>") + len("<|im_end|>")
        tokens = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                loaded.model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
            )
        inside = torch.tensor([start <= a and b <= end for a, b in encoded["offset_mapping"][1:]])
        assert score == pytest.approx(float(losses[inside].mean()), abs=1e-5)


def test_hidden_states_are_averaged_by_position(world, tmp_path):
    """--method rds: weights 1, 2, ..., s over a row's own positions, whatever padding its batch has."""
    run = select.run(world.select(tmp_path / "run", method="rds", aggregate="max"))
    loaded = models.load(ModelConfig(name=str(world.model)))

    def vector(row):
        text = loaded.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = loaded.model(tokens, output_hidden_states=True).hidden_states[-1][0]
        weight = torch.arange(1.0, len(hidden) + 1)
        return torch.nn.functional.normalize((hidden * weight[:, None]).sum(0) / weight.sum(), dim=0)

    target = torch.stack([vector(row) for row in rows_in(world.target)])
    for row, score in list(zip(rows_in(world.pool), scores(run)["_score"], strict=True))[:5]:
        assert score == pytest.approx(float((target @ vector(row)).max()), abs=1e-5)


def test_hidden_states_that_are_not_finite_have_no_score(world, tmp_path, monkeypatch):
    """RDS+ too: such a row has a status instead of a score, and is not chosen when the budget asks for every row."""
    inner = models.load

    def load(*args, **kwargs):
        loaded = inner(*args, **kwargs)
        if loaded.model is not None:

            def spoil(_, inputs, output):
                if len(output.last_hidden_state) > 3:  # a batch of the pool; the target has three rows
                    output.last_hidden_state[0] = float("inf")
                return output

            loaded.model.base_model.register_forward_hook(spoil)
        return loaded

    monkeypatch.setattr(models, "load", load)
    run = select.run(world.select(tmp_path / "run", method="rds", budget="100%"))
    table = scores(run)
    bad = [i for i, status in enumerate(table["_status"]) if status == "nonfinite"]
    assert bad and len(ids(run)) == len(table["_id"]) - len(bad)
    for i in bad:
        assert table["_score"][i] is None and not table["_selected"][i]


@pytest.mark.parametrize("how", ["paper", "mean", "max", "round_robin", "bids"])
def test_every_aggregation_selects(first, world, tmp_path, how):
    """Another aggregation reads the same features: nothing is computed again in a shared folder."""
    run = select.run(world.select(tmp_path / "run", aggregate=how, features=FeaturesConfig(folder=first / "features")))
    assert len(ids(run)) == 6
    if how in ("mean", "max"):  # one subtask of three rows
        wanted = "subtask:target" if how == "mean" else "_nearest_similarity"
        torch.testing.assert_close(torch.tensor(scores(run)["_score"]), torch.tensor(scores(first)[wanted]))


def test_non_finite_rows_are_marked_and_never_chosen(world, first, tmp_path, monkeypatch):
    """A row whose loss is not a number has a status instead of a score; the others keep theirs to the bit."""
    table = scores(first)
    key = table["_key"][table["_id"].index(ids(first)[0])]  # the very best row is the one that breaks
    inner = row_losses
    index = table["_key"].index(key)

    def broken(model, batch):
        values, n = inner(model, batch), len(encoded)
        if model.training or batch["input_ids"].shape[1] < n:
            return values
        same = (batch["input_ids"][:, :n] == torch.tensor(encoded)).all(1)
        values = values.clone()
        values[same] = values[same] * float("nan")  # not torch.where: its gradient would be 0 nan = nan everywhere
        return values

    from pipelines.rows.encode import Encoder
    from pipelines.rows.read import read_pool

    config = world.select(tmp_path / "run")
    tokenizer = models.load(config.model, tokenizer_only=True).tokenizer
    pool, _ = read_pool([world.pool], cache=tmp_path)
    encoded = Encoder(tokenizer, max_length=1024)(pool[index]).input_ids
    monkeypatch.setattr(losses, "row_losses", broken)
    run = select.run(config)
    after = scores(run)
    assert after["_status"][index] == "nonfinite" and after["_score"][index] is None and not after["_selected"][index]
    assert after["_rank"][index] is None and after["_nearest"][index] is None
    others = [i for i in range(60) if i != index]
    assert [after["_score"][i] for i in others] == [table["_score"][i] for i in others]
    assert ids(run)[:5] == ids(first)[1:]
    assert (
        "1 rows have status nonfinite and were not scored" in json.loads((run / "summary.json").read_text())["warnings"]
    )


# --------------------------------------------------------------------------------------------- checkpoints of the user


def test_checkpoints_of_datatools_train(world, tmp_path):
    """The folder of the training run is enough; weights are the mean learning rates between its checkpoints."""
    run = train.run(
        TrainConfig(
            model=ModelConfig(name=str(world.model)),
            data=DataConfig(paths=[str(world.test)]),
            out=tmp_path / "train",
            lora=LoraConfig(rank=4),
            training=TrainingConfig(epochs=3, batch_size=2, learning_rate=1e-3, warmup_ratio=0.5),
        )
    )
    chosen = select.run(world.select(tmp_path / "select", checkpoints=[run]))
    stops = json.loads((chosen / "summary.json").read_text())["checkpoints"]
    assert [s["step"] for s in stops] == [2, 4, 6]
    # linear over T + 1 = 7 with 3 steps up: k / 3 for k <= 3, then (7 - k) / 4
    rates = [1e-3 * (k / 3 if k < 3 else (7 - k) / 4) for k in range(1, 7)]
    assert [s["mean_lr"] for s in stops] == pytest.approx([sum(rates[i : i + 2]) / 2 for i in (0, 2, 4)])
    total = sum(s["mean_lr"] for s in stops)
    assert [s["weight"] for s in stops] == pytest.approx([s["mean_lr"] / total for s in stops])
    assert not (chosen / "warmup").exists()
    one = select.run(world.select(tmp_path / "one", checkpoints=[run / "checkpoints" / "checkpoint-4"]))
    assert [s["step"] for s in json.loads((one / "summary.json").read_text())["checkpoints"]] == [4]


@pytest.mark.parametrize("rank", [4, None])
def test_checkpoints_of_a_trainer_run(world, tmp_path, rank):
    """A plain transformers Trainer, with peft and with all weights: its optimizer.pt has no names."""
    folder = plain_trainer(world, tmp_path / "trainer", rank)
    if rank is None:
        assert not (folder / "checkpoint-2" / "tokenizer.json").exists()
    run = select.run(world.select(tmp_path / "select", checkpoints=[folder]))
    summary = json.loads((run / "summary.json").read_text())
    # Trainer's linear schedule without warm-up: 1, 3/4, 1/2, 1/4 of the peak
    assert [s["mean_lr"] for s in summary["checkpoints"]] == pytest.approx([1e-3 * 0.875, 1e-3 * 0.375])
    assert all(value is not None and math.isfinite(value) for value in scores(run)["_score"])
    assert summary["model"]["seen_share"] == 1.0 if rank else 0.5 < summary["model"]["seen_share"] < 1
    if rank is None:
        assert any("embed_tokens" in name for name in summary["model"]["unseen"])


def plain_trainer(world, folder, rank):
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    loaded = models.load(ModelConfig(name=str(world.model)))
    model = loaded.model.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if rank is not None:
            model = get_peft_model(model, PeftLora(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        ids = torch.arange(40).reshape(8, 5)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    return folder


def test_checkpoints_that_cannot_be_used_are_refused(world, tmp_path):
    folder = plain_trainer(world, tmp_path / "trainer", 4)
    stop = folder / "checkpoint-4"
    state = json.loads((stop / "trainer_state.json").read_text())
    cases = {
        "nothing": (lambda: None, UsageError, "no such folder"),
        "no state": (lambda: (stop / "optimizer.pt").unlink(), DataError, "contains no optimizer.pt"),
        "no log": (
            lambda: (stop / "trainer_state.json").write_text(json.dumps({**state, "log_history": []})),
            DataError,
            "logs no learning rate for steps 3 to 4",
        ),
        "no state.json": (lambda: (stop / "trainer_state.json").unlink(), DataError, "trainer_state.json is missing"),
    }
    saved = shutil.copytree(stop, tmp_path / "saved")
    for name, (damage, error, text) in cases.items():
        shutil.rmtree(stop)
        shutil.copytree(saved, stop)
        damage()
        paths = [tmp_path / "missing"] if name == "nothing" else [folder]
        with pytest.raises(error, match=text):
            checkpoints.find(paths)


def test_a_half_saved_or_damaged_checkpoint_of_ours_is_not_used(world, tmp_path):
    """After a kill inside a save the folder of our own run can be given all the same; damage is refused by name."""
    run = train.run(
        TrainConfig(
            model=ModelConfig(name=str(world.model)),
            data=DataConfig(paths=[str(world.test)]),
            out=tmp_path / "train",
            lora=LoraConfig(rank=4),
            training=TrainingConfig(epochs=2, batch_size=2),
        )
    )
    last = run / "checkpoints" / "checkpoint-4"
    (last / "complete.json").rename(tmp_path / "complete.json")
    (last / "optimizer.pt").write_bytes(b"half")
    assert [c.step for c in checkpoints.find([run])] == [2]
    (tmp_path / "complete.json").rename(last / "complete.json")
    with pytest.raises(DataError, match="checkpoint-4: a file differs from complete.json"):
        checkpoints.find([run])


@pytest.mark.parametrize("mode", ["code", "precond_only"])
def test_forms_of_adam_s_update(first, world, tmp_path, mode):
    run = select.run(world.select(tmp_path / "run", features=FeaturesConfig(adam_mode=mode)))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["formula"]["name"] == {"code": "less-official", "precond_only": "less-preconditioner"}[mode]
    assert scores(run)["_score"] != scores(first)["_score"]
    warned = [text for text in summary["warnings"] if "adam_mode=code" in text]
    assert bool(warned) == (mode == "code"), "the epsilon of the published code drowns this small second moment"
    assert hashes(run / "warmup")["checkpoint-8/optimizer.pt"] == hashes(first / "warmup")["checkpoint-8/optimizer.pt"]


@pytest.mark.parametrize("name", sorted(set(optim.RULES) - {"adamw"}))
def test_any_optimizer_drives_a_selection(first, world, tmp_path, name):
    """Every rule: the warm-up trains with it, and rows are scored by the updates that it would make."""
    warmup = WarmupConfig(minimum_rows=16, epochs=2, batch_size=4, optimizer=name, learning_rate=1e-3)
    run = select.run(world.select(tmp_path / "run", warmup=warmup))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["formula"]["name"] == f"less-{name}"
    assert summary["formula"]["notes"][0].startswith(f"update: {name}(")
    assert None not in scores(run)["_score"]
    # this model's tensors are too small for codes; and without weight decay Adam is AdamW
    same = name in ("adamw_8bit", "adam")
    assert (scores(run)["_score"] == scores(first)["_score"]) == same
    if name == "lion":
        with pytest.raises(DataError, match="adam_mode='code' needs AdamW"):
            select.run(world.select(tmp_path / "code", warmup=warmup, features=FeaturesConfig(adam_mode="code")))


@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
def test_the_method_of_gradients_does_not_change_the_selection(first, world, tmp_path, method):
    """Hooks and the definition agree on every score; so do all stored precisions to their rounding."""
    features = FeaturesConfig(method=method, dtype="float32", token_budget=100)
    # torch.func has no rule for the fused attention and says so
    model = ModelConfig(name=str(world.model), attention="eager" if method == "vmap" else "sdpa")
    run = select.run(world.select(tmp_path / "run", features=features, model=model))
    difference = torch.tensor(scores(run)["_score"]) - torch.tensor(scores(first)["_score"])
    assert float(difference.abs().max()) < 1e-3  # of float16 features
    assert ids(run) == ids(first)


@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.005), ("int8", 0.01), ("int4", 0.1), ("int1", 0.5)])
def test_features_may_be_stored_roughly(first, world, tmp_path, dtype, error):
    """Rounding of the store moves scores by no more than this, and the files are as small as they should be."""
    run = select.run(world.select(tmp_path / "run", features=FeaturesConfig(dtype=dtype)))
    difference = torch.tensor(scores(run)["_score"]) - torch.tensor(scores(first)["_score"])
    assert float(difference.abs().max()) < error
    bits = {"bfloat16": 16, "int8": 8, "int4": 4, "int1": 1}[dtype]
    size = (run / "features" / "train-4" / "part-00000.safetensors").stat().st_size
    assert 16 * 256 * bits / 8 < size < 16 * 256 * bits / 8 + 700


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dtype": "bfloat16"}},
        {"lora": {"targets": "auto"}},
        {"features": {"rows_per_unit": 1, "token_budget": 1}},
        {"model": {"max_length": 40}},
        {"projector": {"name": "rademacher", "dim": 64}},
        {"warmup": {"max_steps": 3, "checkpoints": 1, "schedule": "cosine", "batch_size": 4}},
        {"train": {"dedup": "near"}},
    ],
    ids=str,
)
def test_other_settings_select_too(world, tmp_path, changes):
    settings = world.select(tmp_path / "run")
    changed = {name: getattr(settings, name).model_copy(update=inner) for name, inner in changes.items()}
    run = select.run(settings.model_copy(update=changed))
    table = scores(run)
    assert len(ids(run)) == 6
    assert [value is not None for value in table["_score"]] == [state == "ok" for state in table["_status"]]


@pytest.mark.parametrize("pool", ["one row", "equal rows", "the target itself"])
def test_small_and_degenerate_pools(world, tmp_path, pool):
    """One row, rows of one content (ties go by id), and a pool that is the target: defined answers."""
    rows = rows_in(world.target)
    if pool == "one row":
        rows = rows[:1]
    elif pool == "equal rows":
        rows = [{**rows[0], "id": f"copy-{i}"} for i in (3, 1, 2, 5, 4)]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = select.run(world.select(tmp_path / "run", train=DataConfig(paths=[str(path)]), budget="1"))
    table = scores(run)
    assert len(ids(run)) == 1 and all(math.isfinite(value) for value in table["_score"])
    if pool == "equal rows":
        assert len(set(table["_score"])) == 1 and ids(run) == ["copy-1"]
        assert dict(zip(table["_id"], table["_rank"], strict=True)) == {f"copy-{i}": i for i in range(1, 6)}


def test_a_model_without_the_usual_layer_names(tmp_path, world):
    """GPT-2 has no q_proj: adapters go where its attention is; names that it does not have are refused with its own."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=1, bos_token_id=1, eos_token_id=1)
        ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = ModelConfig(name=str(tmp_path / "gpt2"))
    for method in ("loss", "rds", "less"):
        assert len(ids(select.run(world.select(tmp_path / method, model=model, method=method)))) == 6
    with pytest.raises(DataError, match=r"lora.targets q_proj: no layer .*'c_attn', 'c_fc', 'c_proj'"):
        select.run(world.select(tmp_path / "named", model=model, lora=LoraConfig(targets=["q_proj"])))


# ------------------------------------------------------------------------------------------------ shared features


def test_runs_that_share_a_folder_share_the_pool_s_features(first, world, tmp_path, counted):
    """A second target on the same pool and warm-up costs its target rows; results are those of a run of its own."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    a = select.run(world.select(tmp_path / "a", features=shared))
    assert outcome(first)["scores"] == files.digest_file(a / "scores.parquet") and counted == [2 * (60 + 3)]
    counted[0] = 0
    b = select.run(world.select(tmp_path / "b", features=shared, target=[str(world.test)]))
    assert counted == [2 * 4]
    alone = select.run(world.select(tmp_path / "alone", target=[str(world.test)]))
    assert scores(b)["_score"] == scores(alone)["_score"] and ids(b) == ids(alone)
    both = select.run(world.select(tmp_path / "both", features=shared, target=[str(world.target), str(world.test)]))
    assert counted == [2 * 4 + 2 * 64] and len(ids(both)) == 6


def test_a_shared_folder_with_another_run_s_unfinished_rows(world, tmp_path):
    """Rows that another run has planned and not computed are nobody else's to compute, and it can still finish them."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    select.run(world.select(tmp_path / "a", features=shared))
    for path in (tmp_path / "features").glob("target-*/part-00000.*"):
        path.unlink()
    b = world.select(tmp_path / "b", features=shared, target=[str(world.test)])
    with pytest.raises(DataError, match="another run planned there are not computed yet; finish that run first"):
        select.run(b)
    assert len(ids(select.run(world.select(tmp_path / "a", features=shared)))) == 6
    assert len(ids(select.run(b))) == 6


def test_a_run_waits_for_the_one_that_fills_the_shared_features(first, world, tmp_path, counted, monkeypatch):
    """Both end with what each would have made alone, and nothing is computed twice."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    (tmp_path / "a.yaml").write_text(dump(world.select(tmp_path / "a", features=shared)))
    code = """
        import sys, time
        from pathlib import Path
        import pipelines.select.gradients
        from pipelines.select import run as select
        from pipelines.settings.select import SelectConfig
        from pipelines.settings.load import load_config
        here, inner = Path(sys.argv[1]), pipelines.select.gradients.extract

        def extract(*arguments, **options):
            (here / "filling").touch()
            while not (here / "go").exists():
                time.sleep(0.05)
            return inner(*arguments, **options)

        pipelines.select.gradients.extract = extract
        select.run(load_config(SelectConfig, here / "a.yaml"))
    """
    other = spawn(code, str(tmp_path))
    said = []

    def say(text):
        said.append(text)
        if "waiting for" in text:
            (tmp_path / "go").touch()

    monkeypatch.setattr("pipelines.select.stores.say", say)
    while not (tmp_path / "filling").exists():
        assert other.poll() is None, other.communicate()
        time.sleep(0.05)
    run = select.run(world.select(tmp_path / "b", features=shared))
    _, error = other.communicate(timeout=300)
    assert other.returncode == 0, error
    assert counted == [0] and f"waiting for process {other.pid} on" in said[0]
    for folder in (run, tmp_path / "a"):
        assert {k: v for k, v in outcome(first).items() if "/" not in k} == {
            k: v for k, v in outcome(folder).items() if "/" not in k
        }


# -------------------------------------------------------------------------------------------------- explain and dry run


@pytest.mark.parametrize("line", [1, 6])
def test_explain_s_layers_add_up_to_the_exact_cosine(first, world, line, capsys):
    """The shares are of the unprojected cosine at the checkpoint with the largest weight; projection keeps it near."""
    found = explain.run(ExplainConfig(file=first / "selected.jsonl", line=line, nearest=1))
    assert found["id"] == ids(first)[line - 1] and len(found["targets"]) == 1
    table = scores(first)
    row = table["_id"].index(found["id"])
    assert found["targets"][0]["id"] == table["_nearest"][row]
    assert found["targets"][0]["similarity"] == pytest.approx(table["_nearest_similarity"][row], abs=1e-4)
    total = math.fsum(layer["cosine"] for layer in found["layers"])
    assert total == pytest.approx(exact_cosine(first, world, found["id"], found["targets"][0]["id"]), abs=1e-5)
    assert len({layer["layer"] for layer in found["layers"]}) == len(found["layers"]) == 2 * 4
    shown = capsys.readouterr().out
    assert found["id"] in shown and "layers that carry it" in shown


def exact_cosine(run, world, row_id, target_id):
    """Between the row's update and the target row's gradient, by one backward pass each, at the heaviest checkpoint."""
    from pipelines.rows.prepare import prepare

    config = load_config(SelectConfig, run / "run.yaml", {"out": run}, [])
    stop = max(checkpoints.find([run / "warmup"]), key=lambda c: c.weight)
    loaded = models.load(config.model)
    module = load_adapter(loaded.model, stop.folder)
    params = checkpoints.trainable(module)
    gradients = []
    for data, wanted in ((config.train, row_id), (DataConfig(paths=[str(world.target)]), target_id)):
        rows = prepare(data, config.model, loaded.tokenizer, cache=run, label="rows")
        for p in params.values():
            p.requires_grad_(True)
        loss = row_losses(module, rows.batch([rows.pool.ids.index(wanted)])).sum()
        grads = torch.autograd.grad(loss, list(params.values()))
        gradients.append(dict(zip(params, (g.detach() for g in grads), strict=True)))
        for p in params.values():
            p.requires_grad_(False)
    update = checkpoints.updates(stop, params)(gradients[0])
    flat = [torch.cat([g[name].flatten() for name in params]) for g in (update, gradients[1])]
    return float(torch.cosine_similarity(*flat, dim=0))


def test_explain_reads_what_the_run_read(world, tmp_path, first, capsys):
    """Only the checkpoints that count (the last, though a shared folder holds more), and rows in the user's columns."""
    columns = {"prompt": "frage", "completion": "antwort"}
    for name in ("pool", "target"):
        odd = [
            {"id": row["id"], "frage": row["messages"][0]["content"], "antwort": row["messages"][1]["content"]}
            for row in rows_in(getattr(world, name))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    settings = world.select(
        tmp_path / "all",
        train=DataConfig(paths=[str(tmp_path / "pool.jsonl")], columns=columns),
        target=[str(tmp_path / "target.jsonl")],
        features=FeaturesConfig(folder=tmp_path / "features"),
    )
    select.run(settings)
    warmup = settings.warmup.model_copy(update={"checkpoints": 1})
    run = select.run(settings.model_copy(update={"out": tmp_path / "last", "warmup": warmup}))
    found = explain.run(ExplainConfig(file=run / "selected.jsonl", line=1, nearest=1))
    table = scores(run)
    near = table["_nearest_similarity"][table["_id"].index(found["id"])]
    assert found["targets"][0]["similarity"] == pytest.approx(near, abs=1e-4)


def test_explain_of_other_methods_and_places(world, tmp_path, first, capsys):
    run = select.run(world.select(tmp_path / "run", method="random"))
    assert explain.run(ExplainConfig(file=run / "selected.jsonl", line=1))["layers"] == []
    with pytest.raises(UsageError, match="has 6 lines"):
        explain.run(ExplainConfig(file=run / "selected.jsonl", line=7))
    shutil.copy(run / "selected.jsonl", tmp_path / "selected.jsonl")
    with pytest.raises(UsageError, match="no run.yaml beside it"):
        explain.run(ExplainConfig(file=tmp_path / "selected.jsonl", line=1))


def test_a_dry_run_leaves_nothing_behind(command, world, tmp_path):
    """It reads, encodes, loads the model, says the cost, and neither --out nor a temporary file remains."""
    (tmp_path / "tmp").mkdir()
    before = hashes(world.folder)
    for name in ("select", "train"):
        answer = command(*world.argv(name, "--dry-run", out=tmp_path / "run"), env={"TMPDIR": str(tmp_path / "tmp")})
        assert answer.code == 0 and answer.stdout == "" and "dry run" in answer.stderr, answer.stderr
        assert not (tmp_path / "run").exists() and not list((tmp_path / "tmp").iterdir())
    assert hashes(world.folder) == before


def test_a_dry_run_does_not_touch_the_run_that_is_there(first, world):
    before = hashes(first)
    select.run(world.select(first, seed=9, overwrite=True, dry_run=True))
    assert hashes(first) == before


def test_the_store_of_a_run_can_be_read_by_itself(first):
    """Features are for others too: plain safetensors, named by content, with what they were made of."""
    store = GradientFeatures.open(first / "features" / "train-8")
    assert store.verify() == [] and len(store) == 60 and store.dim == 256
    assert store.meta["gradient"] == [
        "adamw(betas=(0.9, 0.999), eps=1e-08, eps_root=0.0, bias_correction=True, amsgrad=False, "
        "eps_before_correction=False, stochastic_rounding=False)"
    ]
    data = (first / "features" / "train-8" / "part-00000.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["features"]["shape"][1] == 256


def test_a_second_model_in_one_process_is_another_run(world, first, tmp_path):
    save_tiny_model(tmp_path / "other", seed=1)
    run = select.run(world.select(tmp_path / "run", model=ModelConfig(name=str(tmp_path / "other"))))
    assert scores(run)["_score"] != scores(first)["_score"]


def test_words_of_a_row_do_not_depend_on_its_format(world, tmp_path):
    """--method tfidf: pairs, conversations and texts of the same words have the scores that scikit-learn gives them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    topics = ["lanterns glow", "ferries cross the bay", "clay dries slowly", "foxes dig dens", "frost covers roofs"]
    said = [(f"tell me: {t}", f"indeed {t}, item {k}") for k, t in enumerate(topics)]
    shapes = {
        "pair": lambda q, a: {"prompt": q, "completion": a},
        "chat": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        "alpaca": lambda q, a: {"instruction": q, "output": a},
        "text": lambda q, a: {"text": f"{q}\n{a}"},
    }
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
    wanted = ("what do ferries do?", "they cross the bay")
    matrix = vectorizer.fit_transform(["\n".join(pair) for pair in [*said, wanted]])
    right = (matrix[:-1] @ matrix[-1:].T).toarray()[:, 0]
    for pool, target in [(a, b) for a in shapes for b in shapes if "pair" in (a, b)]:
        for name, lines in (("pool", [shapes[pool](*pair) for pair in said]), ("dev", [shapes[target](*wanted)])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = world.select(
            tmp_path / f"{pool}-{target}", method="tfidf", target=[str(tmp_path / "dev.jsonl")], budget="1"
        )
        run = select.run(config.model_copy(update={"train": DataConfig(paths=[str(tmp_path / "pool.jsonl")])}))
        assert scores(run)["_score"] == pytest.approx(right.tolist(), abs=1e-5), (pool, target)


def test_pools_without_a_word_are_refused_by_tfidf(world, tmp_path):
    for name in ("pool", "dev"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "?!", "completion": "..."}\n')
    config = world.select(tmp_path / "run", method="tfidf", target=[str(tmp_path / "dev.jsonl")], budget="1")
    with pytest.raises(DataError, match="no row of the pool or the target holds a word"):
        select.run(config.model_copy(update={"train": DataConfig(paths=[str(tmp_path / "pool.jsonl")])}))


def test_hidden_states_may_be_narrower_than_the_configuration_says(tmp_path, own_world):
    """OPT-350m projects its states to another width than its hidden size; features and clusters take what comes."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    from pipelines.colm.sources import clusters_of

    tokenizer = AutoTokenizer.from_pretrained(own_world.model)
    shutil.rmtree(own_world.model)
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, word_embed_proj_dim=12, do_layer_norm_before=False, pad_token_id=1,
    ))  # fmt: skip
    model.save_pretrained(own_world.model)
    tokenizer.save_pretrained(own_world.model)
    run = select.run(own_world.select(tmp_path / "run", method="rds"))
    model.eval()

    def vector(row):
        tokens = tokenizer(
            tokenizer.apply_chat_template(row["messages"], tokenize=False),
            return_tensors="pt",
            add_special_tokens=False,
        )["input_ids"]
        with torch.no_grad():
            states = model.model(input_ids=tokens).last_hidden_state[0]
        return torch.nn.functional.normalize((states * torch.arange(1.0, len(states) + 1)[:, None]).sum(0), dim=0)

    target = torch.stack([vector(row) for row in rows_in(own_world.target)])
    for row, score in list(zip(rows_in(own_world.pool), scores(run)["_score"], strict=True))[:5]:
        assert score == pytest.approx(float((target @ vector(row)).mean()), abs=1e-5)
    loaded = models.load(ModelConfig(name=str(own_world.model)))
    config = own_world.select(tmp_path / "unused")
    rows = prepare(config.train, config.model, loaded.tokenizer, cache=tmp_path, label="pool")
    assert len(set(clusters_of(loaded.model, rows, range(20), 3, seed=0)[:20])) == 3


def test_what_templates_leave_out_is_counted_in_the_report(own_world, tmp_path):
    rows = [json.loads(line) for line in own_world.pool.read_text().splitlines()]
    for row in rows[:7]:
        row["messages"][1]["reasoning_content"] = "because"
    own_world.pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = select.run(own_world.select(tmp_path / "run", method="tfidf"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["pool"]["flags"] == {"reasoning_dropped": 7}
    said = [text for text in summary["warnings"] if "reasoning" in text]
    assert len(said) == 1 and said[0].startswith("pool: in 7 of 60 rows, the chat template omits reasoning")


def pairs(path, ask, say, count, start=0):
    rows = [{ask: f"tell {k}", say: f"told {k * k}", "text": "not this"} for k in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pool_and_target_have_columns_of_their_own(world, tmp_path):
    """The pool's names, the target's, and, where the target has none, the pool's or those that are usual."""
    pool = DataConfig(paths=[pairs(tmp_path / "pool.jsonl", "q", "r", 6)], columns={"prompt": "q", "completion": "r"})
    mine = world.select(tmp_path / "run", method="tfidf", train=pool, budget="2", target=[str(tmp_path / "dev.jsonl")])
    runs = []
    for n, (ask, say, columns) in enumerate(
        [
            ("frage", "antwort", {"prompt": "frage", "completion": "antwort"}),
            ("q", "r", None),  # the pool's
            ("prompt", "completion", None),  # the usual ones
            ("frage", "antwort", {"dev.jsonl": {"prompt": "frage", "completion": "antwort"}}),
        ]
    ):
        pairs(tmp_path / "dev.jsonl", ask, say, 1, start=3)
        run = select.run(mine.model_copy(update={"out": tmp_path / f"run-{n}", "target_columns": columns}))
        runs.append(scores(run)["_score"])
    assert runs[0] == runs[1] == runs[2] == runs[3] and max(range(6), key=runs[0].__getitem__) == 3
    again = load_config(SelectConfig, tmp_path / "run-3" / "run.yaml")
    assert again.target_columns == {"dev.jsonl": {"prompt": "frage", "completion": "antwort"}}
    pairs(tmp_path / "dev.jsonl", "frage", "antwort", 1)
    (tmp_path / "dev.jsonl").write_text('{"frage": "q", "antwort": "a"}')
    with pytest.raises(DataError, match=r"dev.jsonl:1: .*--target-columns"):
        select.run(world.select(tmp_path / "none", method="tfidf", target=[str(tmp_path / "dev.jsonl")]))


def test_preferences_are_selected_with_the_flag(command, world, tmp_path):
    rows = [{"prompt": f"ask {k}", "chosen": f"good {k}", "rejected": "bad"} for k in range(4)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "select",
        "--model",
        world.model,
        "--train",
        tmp_path / "pool.jsonl",
        "--method",
        "random",
        "--budget",
        "2",
        "--out",
        tmp_path / "run",
    ]
    answer = command(*map(str, argv))
    assert answer.code == 3 and "preference_row" in answer.stderr and "--preference chosen" in answer.stderr
    answer = command(*map(str, [*argv, "--preference", "chosen"]))
    assert answer.code == 0, answer.stderr
    examples = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert all(e["answer"].startswith("good") for e in examples)
