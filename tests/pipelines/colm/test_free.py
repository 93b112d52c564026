"""`stored` and `stale` features in `datatools train`, `CoresetMixin` and in memory: no pass over the large batch."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import DataError, GradientFeatures, UsageError
from pipelines.colm import coreset
from pipelines.select.run import run as select
from pipelines.settings.parts import DataConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training import train
from tests.optim.distributed.processes import run as in_processes
from tests.pipelines.colm.runs import metrics, settings
from tests.pipelines.colm.test_coresets import trained, without_seconds
from tests.pipelines.colm.test_mixin import CoresetTrainer, build, rows_with_sources, strict, weights
from tests.pipelines.training.runs import result
from tests.tiny import save_tiny_model

SIZES = {"keep": 4, "large_batch": 8, "monitor_every": 1}


@pytest.fixture(scope="module")
def stores(world, tmp_path_factory):
    """The features of two selections on the rows that are trained on: gradients of LESS, and hidden states."""
    home = tmp_path_factory.mktemp("stores")
    data = DataConfig(paths=[str(world.folder / "mixed.jsonl")])
    less = select(world.select(home / "less", train=data))
    rds = select(world.select(home / "rds", train=data, method="rds"))
    gradients = max((less / "features").glob("train-*"), key=lambda path: int(path.name.partition("-")[2]))
    return {"less": gradients, "rds": rds / "features" / "hidden-pool"}


def stored(store, **more):
    return CoresetConfig(**SIZES | {"features": "stored", "store": store} | more)


@pytest.fixture
def passes(monkeypatch):
    """How often rows went through the model to be chosen."""
    from datatools.colm.measuring import Measuring

    counted, inner = [], Measuring._measure

    def measure(self, kind, batch, *args, **kwargs):
        counted.append(len(batch["input_ids"]))
        return inner(self, kind, batch, *args, **kwargs)

    monkeypatch.setattr(Measuring, "_measure", measure)
    return counted


@pytest.mark.parametrize("name, method", [("less", "herding"), ("rds", "matching_pursuit")])
def test_stored_features_choose_without_a_pass(world, stores, tmp_path, passes, name, method):
    run = train.run(settings(world, tmp_path / "run", coreset=stored(stores[name], method=method)))
    lines = metrics(run)
    assert [e["step"] for e in lines if "match_error" in e] == [1, 6], "measured every fifth step"
    assert passes == [8, 8], "and these are all the passes"
    assert all(e["known_share"] == 1 and "feature_age" not in e for e in lines if "match_error" in e)
    assert "stored" in (run / "report.html").read_text()
    found = GradientFeatures.open(stores["less"]).rows()
    assert len(found.keys) == 40


def test_features_are_measured_again_and_a_resumed_run_ends_with_the_same_bits(world, tmp_path, passes):
    again = CoresetConfig(**SIZES, features="stored", refresh_every=4, kept_dim=32)
    changes = {"coreset": again, "save_steps": 3}
    whole = train.run(settings(world, tmp_path / "whole", **changes))
    assert sum(passes) == 3 * 40 + 2 * 8, "before steps 1, 5 and 9, and two monitored steps"
    ages = [e["feature_age"] for e in metrics(whole) if "match_error" in e]
    assert ages == [0.0, 1.0]
    run = shutil.copytree(whole, tmp_path / "run")
    for later in ("adapter", "checkpoints/checkpoint-6", "checkpoints/checkpoint-9", "checkpoints/checkpoint-10"):
        shutil.rmtree(run / later)
    train.run(settings(world, run, **changes))
    assert without_seconds(result(run)) == without_seconds(result(whole))


def test_features_of_a_store_may_have_another_width_than_those_measured_later(world, stores, tmp_path):
    choose = stored(stores["rds"], refresh_every=2)
    run = train.run(settings(world, tmp_path / "run", coreset=choose, training=TrainingConfig(epochs=2, max_steps=6)))
    seen = [e for e in metrics(run) if "match_error" in e]
    assert "feature_age" not in seen[0] and seen[1]["feature_age"] == 1 and seen[1]["known_share"] == 1


@pytest.mark.parametrize("more", [{}, {"method": "importance", "by_product": "loss"}, {"stale_limit": 7}])
def test_stale_features_are_by_products_and_a_resumed_run_ends_with_the_same_bits(world, tmp_path, passes, more):
    changes = {"coreset": CoresetConfig(**SIZES, features="stale", **more), "save_steps": 4}
    whole = train.run(settings(world, tmp_path / "whole", **changes))
    seen = [e for e in metrics(whole) if "match_error" in e]
    assert seen[0]["known_share"] == 0 and 0 < seen[1]["known_share"] < 1
    assert sum(passes) == 16 and 0 < seen[1]["feature_age"] <= 9
    run = shutil.copytree(whole, tmp_path / "run")
    for later in ("adapter", "checkpoints/checkpoint-8", "checkpoints/checkpoint-10"):
        shutil.rmtree(run / later)
    train.run(settings(world, run, **changes))
    assert without_seconds(result(run)) == without_seconds(result(whole))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_what_they_have_seen(world, tmp_path):
    changes = {"coreset": CoresetConfig(**SIZES, features="stale"), "lora": None,
               "training": TrainingConfig(epochs=2, micro_tokens=80)}  # fmt: skip
    one = train.run(settings(world, tmp_path / "one", **changes))
    in_processes(trained, 2, tmp_path, settings(world, tmp_path / "two", **changes))
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours.get("kept_by_source") == theirs.get("kept_by_source")


def test_what_cannot_be_used_is_refused_before_training(world, stores, tmp_path):
    def refused(error, text, choose, **changes):
        with pytest.raises(error, match=text):
            train.run(settings(world, tmp_path / "bad", coreset=choose, **changes))
        assert not (tmp_path / "bad" / "checkpoints").exists()

    other = save_tiny_model(tmp_path / "other", seed=1)
    from pipelines.settings.parts import ModelConfig

    refused(DataError, r"train-\d+ are of another model \(model.safetensors differ\)", stored(stores["less"]),
            model=ModelConfig(name=str(other)))  # fmt: skip
    refused(DataError, r"no features of 20 of the 60 rows \(the first is .*pool\.jsonl:41\)", stored(stores["less"]),
            data=DataConfig(paths=[str(world.pool)]))  # fmt: skip
    refused(DataError, "no plan.json.; it contains .*hidden-", stored(stores["rds"].parents[1]))
    refused(DataError, "there is no such folder", stored(tmp_path / "nothing"))
    refused(UsageError, "stored features need a store .*refresh_every", CoresetConfig(**SIZES, features="stored"))
    refused(UsageError, "only stored features read coreset.store", CoresetConfig(**SIZES, store=stores["less"]))
    refused(UsageError, "only stale features read coreset.stale_limit", CoresetConfig(**SIZES, stale_limit=3))
    refused(UsageError, r"draws each row once \(5 steps, 5 per epoch\)", CoresetConfig(**SIZES, features="stale"),
            training=TrainingConfig(epochs=1))  # fmt: skip
    refused(UsageError, "older than coreset.stale_limit=4 steps are not used",
            CoresetConfig(**SIZES, features="stale", stale_limit=4))  # fmt: skip
    refused(UsageError, "gradient zo does not do", CoresetConfig(**SIZES, features="stale"),
            training=TrainingConfig(gradient="zo", optimizer="sgd", epochs=2))  # fmt: skip
    refused(UsageError, "rule 'adam' needs gradients", stored(stores["less"], rule="adam"))
    refused(UsageError, "'expectation' are weights of rows", stored(stores["less"], loss_weighting="token"))


def test_in_memory_rows_are_chosen_by_a_store_of_the_same_model(world, tmp_path):
    from pipelines import select as select_in_memory

    rows = [json.loads(line) for line in world.pool.read_text().splitlines()]
    target = [json.loads(line) for line in world.target.read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    select_in_memory(model, tokenizer, rows, target, budget="10%", method="rds", out=tmp_path / "run")
    own = {"coreset.features": "stored", "coreset.store": str(tmp_path / "run/features/hidden-pool")}
    found = coreset(model, tokenizer, rows, keep=8, large_batch=16, settings=own)
    assert len(found) == 30 and len(found.errors) == 1, "only the first large batch is measured"
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(DataError, match=r"of another model \(weights in memory differ\)"):
        coreset(model, tokenizer, rows, keep=8, settings=own)
    with pytest.raises(UsageError, match="nothing is trained here"):
        coreset(model, tokenizer, rows, keep=8, settings={"coreset.features": "stale"})


def test_another_trainer_uses_what_it_saw_of_its_rows(tmp_path, passes):
    choose = {"choose": {"keep": 3, "features": "stale", "monitor_every": 1}, "source_key": "kind"}
    whole = build(tmp_path / "a", **choose)
    whole.train()
    seen = [e for e in whole.state.log_history if "match_error" in e]
    assert [e["step"] for e in seen] == [1, 6] and sum(passes) == 4 * 6
    assert seen[0]["known_share"] == 0 and seen[1]["known_share"] > 0.1
    again = build(tmp_path / "b", **choose)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    refreshed = build(tmp_path / "c", choose={"keep": 3, "features": "stored", "refresh_every": 2}, source_key="kind",
                      data=[row | {"text": "a"} for row in rows_with_sources()])  # fmt: skip
    refreshed.data_collator.inner = strict
    refreshed.train()
    assert refreshed._choosing._given.table.ages(range(36), step=6) == [2] * 36
    whole.args.max_steps = 4
    with pytest.raises(UsageError, match="a stream of rows does not have"):
        CoresetTrainer(model=whole.model, args=whole.args, train_dataset=rows_with_sources().to_iterable_dataset(),
                       data_collator=whole.data_collator, source_key=None, choose=choose["choose"])  # fmt: skip
