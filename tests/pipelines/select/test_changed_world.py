"""A changed model, pool, target or code is refused by name; an accepted change costs what changed."""

import json

import pytest

import pipelines.select.gradients
from datatools import DataError, UsageError
from pipelines.runs import provenance
from pipelines.select import run as select
from pipelines.settings.parts import LoraConfig
from pipelines.settings.select import FeaturesConfig
from tests.pipelines.select.looking import flip, hashes, ids, outcome, scores
from tests.tiny import write_rows


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
