"""Coresets in `datatools train`: what is kept, continued runs, several processes, and bad input."""

import json
import shutil
from collections import Counter

import pytest
import torch

from datatools import DataError, UsageError, small_sources
from pipelines.colm import choosing, coresets
from pipelines.models import load as models
from pipelines.models.lora import add_lora
from pipelines.models.losses import last_states, row_losses, token_losses
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import DataConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training import fit, train
from tests.optim.distributed.processes import run
from tests.pipelines.colm.runs import LORA, metrics, settings
from tests.pipelines.training.runs import result


def without_seconds(found):
    lines = [json.loads(line) for line in found["metrics"].splitlines()]
    measured = ("_seconds", "_bytes", "_share", "costs_more")  # which time decides
    return found | {"metrics": [{k: v for k, v in e.items() if not k.endswith(measured)} for e in lines]}


# ------------------------------------------------------------------------------------------------------ datatools train


def test_metrics_of_monitored_steps(first):
    lines = metrics(first)
    assert [e["step"] for e in lines] == list(range(1, 11))
    assert [e["step"] for e in lines if "match_error" in e] == [1, 4, 7, 10]
    for entry in lines[::3]:
        assert entry["match_error"] >= 0 and entry["match_error_random"] > 0
        assert entry["select_seconds"] > 0 and entry["train_seconds"] > 0
        assert 2**24 < entry["peak_bytes"] < 2**36, "more than Python itself, less than a machine has"
        kept, seen = Counter(entry["kept_by_source"]), Counter(entry["seen_by_source"])
        assert kept.total() == 4 and seen.total() == 8 and kept["rare"] == min(4, seen["rare"])


def test_the_kept_rows_are_small_sources_and_the_rest_by_quota(world, tmp_path):
    """Every row of the loader's batches is seen once an epoch; rows of rare sources are all trained on."""
    loaded = models.load(ModelConfig(name=str(world.model)))
    data = DataConfig(paths=[str(world.folder / "mixed.jsonl")])
    rows = prepare(data, ModelConfig(name=str(world.model)), loaded.tokenizer, cache=tmp_path, label="data")
    trained = []
    fit.fit(
        add_lora(loaded.model, LORA, seed=0),
        rows.item,
        list(range(40)),
        TrainingConfig(epochs=1, batch_size=8),
        tmp_path / "run",
        seed=1,
        observe=lambda step, kept: trained.append(list(kept)),
        choose=coresets.Coresets(CoresetConfig(keep=4), rows.pool.sources.__getitem__),
    )
    assert small_sources(Counter(rows.pool.sources)) == {"rare"}
    assert [len(kept) for kept in trained] == [4] * 5 and len({i for kept in trained for i in kept}) == 20
    rare = {i for i in range(40) if rows.pool.sources[i] == "rare"}
    assert rare <= {i for kept in trained for i in kept}


def test_keeping_every_row_changes_no_bit(world, tmp_path):
    """The choice is measured at every step, and neither dropout nor the order of rows sees that it happened."""
    plain = train.run(settings(world, tmp_path / "plain", coreset=None,
                               training=TrainingConfig(epochs=1, batch_size=8, micro_tokens=160)))  # fmt: skip
    everything = CoresetConfig(keep=8, large_batch=8, monitor_every=1, loss_weighting="token")
    whole = train.run(settings(world, tmp_path / "whole", coreset=everything,
                               training=TrainingConfig(epochs=1, micro_tokens=160)))  # fmt: skip
    for name in ("adapter/adapter_model.safetensors", "checkpoints/checkpoint-5/optimizer.pt",
                 "checkpoints/checkpoint-5/rng_state.pth"):  # fmt: skip
        assert (plain / name).read_bytes() == (whole / name).read_bytes(), name
    assert [(e["step"], e["loss"]) for e in metrics(plain)] == [(e["step"], e["loss"]) for e in metrics(whole)]
    assert all(e["match_error"] < 1e-6 for e in metrics(whole))


def test_a_step_counts_rows_alike_or_tokens(world, tmp_path):
    """By default the loss of a step is the mean of its rows' means; 'token' is the mean over tokens."""
    loaded = models.load(ModelConfig(name=str(world.model)))
    data = DataConfig(paths=[str(world.folder / "mixed.jsonl")])
    rows = prepare(data, ModelConfig(name=str(world.model)), loaded.tokenizer, cache=tmp_path, label="data")
    for weighting in ("example", "token"):
        kept = []
        done = fit.fit(
            add_lora(loaded.model, LORA.model_copy(update={"dropout": 0.0}), seed=0),
            rows.item,
            list(range(40)),
            TrainingConfig(epochs=1, batch_size=8, micro_tokens=160, learning_rate=0.0),
            tmp_path / weighting,
            seed=1,
            observe=lambda step, chosen, kept=kept: kept.append(list(chosen)),
            choose=coresets.Coresets(CoresetConfig(keep=4, loss_weighting=weighting), rows.pool.sources.__getitem__),
        )
        for chosen, loss in zip(kept, done.losses, strict=True):
            with torch.no_grad():
                losses, _where = token_losses(loaded.model, rows.batch(chosen))
                each = row_losses(loaded.model, rows.batch(chosen))
            want = each.mean() if weighting == "example" else losses.mean()
            assert loss == pytest.approx(float(want), abs=2e-4)
        loaded = models.load(ModelConfig(name=str(world.model)))


METHODS = {
    "herding": CoresetConfig(keep=4, large_batch=8, monitor_every=1),
    "published": CoresetConfig(
        keep=4, large_batch=8, monitor_every=1, method="facility_location", features="paper_code"
    ),
    "probes": CoresetConfig(keep=4, large_batch=8, features="probes", probes=4, rule="adam"),
    "weights": CoresetConfig(keep=4, large_batch=8, method="matching_pursuit"),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits(world, tmp_path, name):
    """The checkpoint of step 2 of 5, with the history of a rule that has one."""
    changes = {"coreset": METHODS[name], "save_steps": 2, "training": TrainingConfig(epochs=1, micro_tokens=160)}
    whole = train.run(settings(world, tmp_path / "whole", **changes))
    run = shutil.copytree(whole, tmp_path / "run")
    for later in ("adapter", "checkpoints/checkpoint-4", "checkpoints/checkpoint-5"):
        shutil.rmtree(run / later)
    train.run(settings(world, run, **changes))
    assert without_seconds(result(run)) == without_seconds(result(whole))
    for step in (2, 4, 5):
        history = f"checkpoints/checkpoint-{step}/coreset-0.safetensors"
        assert (run / history).read_bytes() == (whole / history).read_bytes()


def test_zeroth_order_trains_on_the_rows_that_are_kept(first, world, tmp_path):
    """The choice reads gradients of one layer and leaves none; the step evaluates the loss of the kept rows alone.

    Resumed in mid-epoch to the same bits. `first` is the same run by back-propagation: its first choice is the same.
    """
    recipe = TrainingConfig(gradient="zo", optimizer="sgd", learning_rate=1e-3, epochs=2, micro_tokens=160)
    whole = train.run(settings(world, tmp_path / "whole", training=recipe, save_steps=2))
    lines, theirs = metrics(whole), metrics(first)
    assert len(lines) == 10 and [e["step"] for e in lines if "match_error" in e] == [1, 4, 7, 10]
    for key in ("match_error", "match_error_random", "kept_by_source", "seen_by_source"):
        assert lines[0][key] == theirs[0][key], key
    assert lines[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=0.01), "at p + eps z, without dropout"
    assert lines[0]["loss"] != theirs[0]["loss"]
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    for step in (4, 6, 8, 10):
        shutil.rmtree(run / f"checkpoints/checkpoint-{step}")
    train.run(settings(world, run, training=recipe, save_steps=2))
    assert without_seconds(result(run)) == without_seconds(result(whole))
    assert (run / "zeroth_order.jsonl").read_text() == (whole / "zeroth_order.jsonl").read_text()


def test_a_killed_command_goes_on(command, world, tmp_path):
    argv = [
        "train", "--model", world.model, "--data", world.folder / "mixed.jsonl", "--coreset", "colm",
        "--large-batch", 8, "--keep", 4, "--source-key", "dataset", "--lora-rank", 4, "--epochs", 1,
        "--set", "save_steps=2", "--set", "coreset.method=facility_location", "--out",
    ]  # fmt: skip
    whole = command(*argv, tmp_path / "whole")
    assert whole.code == 0, whole.stderr
    killed = command(*argv, tmp_path / "run", die=["pipelines.training.trainer:mark_complete", 2, "after"])
    assert killed.code == -9
    again = command(*argv, tmp_path / "run")
    assert again.code == 0 and "4 rows kept of 8 per step, by facility_location" in again.stderr, again.stderr
    assert without_seconds(result(tmp_path / "run")) == without_seconds(result(tmp_path / "whole"))


def trained(config):
    return str(train.run(config))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_of_one_command_choose_what_one_chooses(world, tmp_path):
    """Each makes half of the passes over a large batch; the history is one, saved once, and a run goes on from it."""
    changes = {
        "coreset": METHODS["published"].model_copy(update={"features": "exact", "token_budget": 80}), "save_steps": 2,
        "training": TrainingConfig(epochs=1, micro_tokens=80), "lora": LORA.model_copy(update={"dropout": 0.0}),
    }  # fmt: skip
    one = train.run(settings(world, tmp_path / "one", **changes))
    two = tmp_path / "two"
    run(trained, 2, tmp_path, settings(world, two, **changes))
    assert [p.name for p in (two / "checkpoints/checkpoint-2").glob("coreset-*")] == ["coreset-0.safetensors"]
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours["kept_by_source"] == theirs["kept_by_source"]
        for key in ("loss", "match_error", "match_error_random"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    finished = result(two)
    for later in ("adapter", "checkpoints/checkpoint-4", "checkpoints/checkpoint-5"):
        shutil.rmtree(two / later)
    run(trained, 2, tmp_path, settings(world, two, **changes))
    assert without_seconds(result(two)) == without_seconds(finished)


def test_sources_by_clustering(world, tmp_path):
    run = train.run(settings(world, tmp_path / "run", coreset=CoresetConfig(keep=4, clusters=3),
                             training=TrainingConfig(epochs=1)))  # fmt: skip
    found = json.loads((run / "coreset.json").read_text())["sources"]
    assert set(found) <= {"cluster 0", "cluster 1", "cluster 2"} and sum(found.values()) == 40


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_model_without_fused_attention_and_with_a_joint_projection(world, tmp_path):
    """CodeGen has no sdpa and is loaded with its own attention; its queries, keys and values are interleaved."""
    from transformers import AutoTokenizer, CodeGenConfig, CodeGenForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    torch.manual_seed(0)
    config = CodeGenConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256)
    CodeGenForCausalLM(config).save_pretrained(tmp_path / "codegen")
    tokenizer.save_pretrained(tmp_path / "codegen")
    run = train.run(settings(world, tmp_path / "run", model=ModelConfig(name=str(tmp_path / "codegen")),
                             training=TrainingConfig(epochs=1)))  # fmt: skip
    assert all(e["loss"] > 0 for e in metrics(run)) and 0 < metrics(run)[0]["match_error"] < 2


def test_hidden_states_of_models_that_do_not_say_what_their_decoder_is():
    from tests.zoo import build as zoo

    model, ids = zoo.build("Llama4ForCausalLM"), torch.randint(8, 60, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(last_states(model, ids)), model(input_ids=ids).logits)


def test_sizes_and_sources_that_do_not_fit_are_refused(world, tmp_path):
    def refused(text, **changes):
        with pytest.raises(UsageError, match=text):
            train.run(settings(world, tmp_path / "bad", **changes))
        assert not (tmp_path / "bad" / "checkpoints").exists(), "refused before anything is trained"

    refused(r"cannot keep 41 rows per step, because the data has 40; .*--keep", coreset=CoresetConfig(keep=41))
    refused("cannot keep 20 rows of a large batch of 8", coreset=CoresetConfig(large_batch=8),
            training=TrainingConfig(batch_size=20))  # fmt: skip
    refused("no row has the small source 'rara'", coreset=CoresetConfig(keep=4, small=["rara"]))
    nameless = DataConfig(paths=[str(world.folder / "mixed.jsonl")], source_key="nope")
    refused(r"none of the 40 rows names its source \(no column 'nope'\).*--source-key.*clusters", data=nameless)
    with pytest.raises(ValueError, match="cannot keep 9 rows of a large batch of 8"):
        CoresetConfig(keep=9, large_batch=8)
    refused("matching_pursuit gives weights", coreset=CoresetConfig(method="matching_pursuit", loss_weighting="token"))


def test_one_source_works_with_a_warning_and_a_short_last_batch_is_halved_too(world, tmp_path, capsys):
    lines = (world.folder / "mixed.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(line for line in lines if '"large"' in line)[:-1] + "\n")
    data = DataConfig(paths=[str(tmp_path / "one.jsonl")])
    run = train.run(settings(world, tmp_path / "run", data=data, training=TrainingConfig(epochs=1),
                             coreset=CoresetConfig(keep=4, large_batch=8, monitor_every=1)))  # fmt: skip
    assert "all rows belong to the source 'large'" in capsys.readouterr().err
    kept = [sum(e["kept_by_source"].values()) for e in metrics(run)]
    seen = [sum(e["seen_by_source"].values()) for e in metrics(run)]
    assert kept == [max(1, round(n / 2)) for n in seen] and seen[-1] < 8


def test_losses_that_are_not_finite_stop_the_run_and_leave_the_weights(world, tmp_path, monkeypatch):
    good, calls = choosing.row_losses, []

    def rotten(model, batch):
        calls.append(1)
        return good(model, batch) * (torch.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(choosing, "row_losses", rotten)
    loaded = models.load(ModelConfig(name=str(world.model)))
    data = DataConfig(paths=[str(world.folder / "mixed.jsonl")])
    rows = prepare(data, ModelConfig(name=str(world.model)), loaded.tokenizer, cache=tmp_path, label="data")
    module = add_lora(loaded.model, LORA, seed=0)
    states = []
    with pytest.raises(DataError, match=r"features of rows \S+mixed\.jsonl:\d+, .* are not finite"):
        fit.fit(
            module, rows.item, list(range(40)), TrainingConfig(epochs=1, batch_size=8), tmp_path / "run", seed=1,
            observe=lambda step, kept: states.append({k: p.clone() for k, p in module.named_parameters()}),
            choose=coresets.Coresets(CoresetConfig(keep=4), rows.pool.sources.__getitem__), name_of=rows.pool.where,
        )  # fmt: skip
    assert states and not any(p.isnan().any() for p in module.parameters())
    assert all(p.grad is None or not p.grad.isnan().any() for p in module.parameters())
