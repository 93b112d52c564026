"""Coresets in the training loop: nothing else changes, every run can be resumed, and the report says what it did."""

import json
import math
import re
import shutil
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from datatools import DataError, UsageError, files, small_sources
from pipelines.colm import CoresetMixin, choosing, coresets
from pipelines.models import load as models
from pipelines.models.lora import add_lora
from pipelines.models.losses import last_states, row_losses, token_losses
from pipelines.report import colm_page as coreset_report
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig, TrainConfig
from pipelines.training import fit, train
from tests.optim.distributed.processes import run
from tests.pipelines import damage
from tests.pipelines.conftest import make_world
from tests.pipelines.training.test_train import result

LORA = LoraConfig(rank=4, dropout=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose `mixed.jsonl` has 40 rows: 20 of big, 16 of large, 4 of rare."""
    made = make_world(tmp_path_factory.mktemp("world"))
    lines = [json.loads(line) for line in made.pool.read_text().splitlines()[:40]]
    for i, row in enumerate(lines):
        row["dataset"] = "rare" if i % 10 == 3 else "big" if i % 2 else "large"
    lines[0]["dataset"] = "big"
    (made.folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return made


def settings(world, out, **changes):
    """Ten steps, five an epoch: 4 rows kept of 8."""
    values = {
        "model": ModelConfig(name=str(world.model)),
        "data": DataConfig(paths=[str(world.folder / "mixed.jsonl")]),
        "out": out,
        "lora": LORA,
        "training": TrainingConfig(epochs=2, micro_tokens=160),
        "coreset": CoresetConfig(keep=4, large_batch=8, monitor_every=3),
    }
    return TrainConfig(**values | changes)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_seconds(found):
    lines = [json.loads(line) for line in found["metrics"].splitlines()]
    measured = ("_seconds", "_bytes", "_share")
    return found | {"metrics": [{k: v for k, v in e.items() if not k.endswith(measured)} for e in lines]}


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    return train.run(settings(world, tmp_path_factory.mktemp("runs") / "first"))


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


# -------------------------------------------------------------------------------------------------- any other Trainer


class CoresetTrainer(CoresetMixin, Trainer):
    """What a user writes."""


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            attention_dropout=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip


def rows_with_sources(n=36):
    from datasets import Dataset

    g = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        ids = torch.randint(3, 60, (6 + i % 5,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:], "kind": "rare" if i % 9 == 0 else f"s{i % 2}"})
    return Dataset.from_list(rows)


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key, empty):
        return torch.tensor([row[key] + [empty] * (width - len(row[key])) for row in rows])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != 0).long()}


def build(folder, cls=CoresetTrainer, data=None, **changes):
    own = {key: changes.pop(key) for key in ("choose", "source_key") if key in changes}
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "seed": 5,
    }  # fmt: skip
    return cls(model=tiny(), args=TrainingArguments(**values | changes), train_dataset=data or rows_with_sources(),
               eval_dataset=rows_with_sources(5), data_collator=pad, **own)  # fmt: skip


CHOOSE = {"choose": CoresetConfig(keep=3, monitor_every=2, method="facility_location"), "source_key": "kind"}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_accumulation_token_counts_and_evaluation(tmp_path):
    """3 steps an epoch of 2 micro-batches of 3 rows kept of 6; the loss is over the tokens of kept rows."""
    made = build(tmp_path, **CHOOSE)
    counts, steps = [], []
    inner = made.training_step

    def spy(model, inputs, num_items_in_batch=None):
        assert set(inputs) - {"coreset_weights"} == {"input_ids", "labels", "attention_mask"}
        assert len(inputs["input_ids"]) == 3
        counts.append((int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)))
        return inner(model, inputs, num_items_in_batch)

    made.training_step = spy
    made.train()
    steps = [counts[i : i + 2] for i in range(0, len(counts), 2)]
    assert made.state.global_step == 6 and len(counts) == 12
    assert all(total == sum(n for n, _ in step) for step in steps for _, total in step)
    watched = [e for e in made.state.log_history if "match_error" in e]
    assert [e["step"] for e in watched] == [1, 3, 5] and sum(watched[0]["kept_by_source"].values()) == 6
    assert "eval_loss" in made.evaluate()


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_another_trainer_resumes_in_mid_epoch_to_the_same_bits(tmp_path, weighting):
    settings = CHOOSE | {"choose": CHOOSE["choose"].model_copy(update={"loss_weighting": weighting})}
    whole = build(tmp_path / "a", **settings)
    whole.train()
    again = build(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    assert again._choosing._colm.state_dict().keys() > {"exp_avg", "exp_avg_sq"}


def test_another_trainer_without_a_choice_is_untouched(tmp_path):
    found = []
    everything = {"choose": CoresetConfig(keep=6, monitor_every=1), "source_key": "kind"}
    for own in ({"cls": Trainer}, {"choose": None}, everything):
        made = build(tmp_path, save_strategy="no", **own)  # which seeds the generator that dropout draws from
        made.train()
        found.append(weights(made))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("weighting", [None, "example"])
def test_rows_without_a_supervised_token_are_never_chosen(tmp_path, weighting, capsys):
    """As after a cut that leaves nothing of the answer: they train nothing, and the others are reduced as ever."""
    from datasets import Dataset

    rows = rows_with_sources().to_list()
    for i in range(0, 36, 3):
        rows[i]["labels"] = [-100] * len(rows[i]["labels"])
    seen = []
    for keep in (None, 6, 3):
        choose = None if keep is None else CoresetConfig(keep=keep, loss_weighting=weighting, monitor_every=1)
        cls = Trainer if keep is None else CoresetTrainer
        own = {} if keep is None else {"choose": choose, "source_key": "kind"}
        made = build(tmp_path, cls, Dataset.from_list(rows), save_strategy="no", num_train_epochs=1, **own)
        for layer in made.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        kept, inner = [], made.training_step

        def spy(model, inputs, num_items_in_batch=None, kept=kept, inner=inner):
            kept.append((inputs["labels"][:, 1:] != -100).any(1).tolist())
            return inner(model, inputs, num_items_in_batch)

        made.training_step = spy
        made.train()
        seen.append((kept, [e["loss"] for e in made.state.log_history if "loss" in e], weights(made)))
    (plain, losses, at), (whole, same, there), (half, others, _) = seen
    assert sum(map(sum, plain)) == 24 == sum(map(sum, whole)) and all(all(step) for step in whole + half)
    assert [len(step) for step in half] == [max(1, round(sum(step) / 2)) for step in plain]
    if weighting is None:
        torch.testing.assert_close(torch.tensor(same), torch.tensor(losses), rtol=1e-4, atol=0)
        torch.testing.assert_close(there, at, rtol=1e-3, atol=1e-4)
    assert all(loss > 0 for loss in others)
    assert capsys.readouterr().err.count("have no supervised token; such rows are never chosen") == 2, "once a run"


def test_a_step_of_rows_without_a_supervised_token_trains_nothing(tmp_path):
    from datasets import Dataset

    rows = rows_with_sources(12).to_list()
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    made = build(tmp_path, data=Dataset.from_list(rows), save_strategy="no", num_train_epochs=1,
                 choose=CoresetConfig(keep=3, loss_weighting="example"), source_key="kind")  # fmt: skip
    before = weights(made).clone()
    made.train()
    assert torch.equal(weights(made), before)


def test_training_again_reads_the_model_and_the_history_that_it_has_now(tmp_path):
    made = build(tmp_path, save_strategy="no", max_steps=2, **CHOOSE)
    made.train()
    first = made._choosing._colm
    made.train()
    assert made._choosing._colm is first
    made.model = tiny()
    made.model_wrapped, made.optimizer, made.lr_scheduler = made.model, None, None
    made.train()
    assert made._choosing._colm is not first and made._choosing._colm.model is made.model
    saved = build(tmp_path / "saved", **CHOOSE)
    saved.train()
    exact = {k: v.clone() for k, v in saved._choosing._colm.state_dict().items()}
    saved.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-2"))
    assert all(torch.equal(v, exact[k]) for k, v in saved._choosing._colm.state_dict().items()), (
        "from step 2, not from step 6"
    )


def test_lists_of_a_batch_are_reduced_with_its_rows(tmp_path):
    made = build(tmp_path, **CHOOSE)
    inner, seen = made.data_collator.inner, []
    made.data_collator.inner = lambda rows: inner(rows) | {"texts": [str(row["input_ids"]) for row in rows]}
    step = made.training_step

    def spy(model, inputs, num_items_in_batch=None):
        texts, ids = inputs.pop("texts"), inputs["input_ids"]
        seen.append([text == str([t for t in row if t]) for text, row in zip(texts, ids.tolist(), strict=True)])
        return step(model, inputs, num_items_in_batch)

    made.training_step = spy
    made.train()
    assert all(len(each) == 3 and all(each) for each in seen)


def test_a_model_without_a_value_projection_is_refused_before_the_first_step(tmp_path):
    from tests.zoo import build as zoo

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none",
                                  per_device_train_batch_size=6)  # fmt: skip
    with pytest.raises(DataError, match="ReformerModelWithLMHead: .*coresets cannot use this architecture"):
        CoresetTrainer(model=zoo.build("ReformerModelWithLMHead"), args=arguments, data_collator=pad,
                       train_dataset=rows_with_sources(), **CHOOSE)  # fmt: skip


def test_bfloat16(tmp_path):
    made = build(tmp_path, bf16=True, **CHOOSE)
    made.train()
    assert weights(made).isfinite().all() and made.state.global_step == 6
    assert (
        made._choosing._colm.target.product
        and made._choosing._colm.target.replays
        and made._choosing._colm.target.forwards
    )


def test_what_another_trainer_refuses(tmp_path):
    with pytest.raises(UsageError, match=r"no column 'dataset', it has \['input_ids', 'labels', 'kind'\]"):
        build(tmp_path, choose=CoresetConfig(keep=3))
    with pytest.raises(UsageError, match="cannot keep 7 rows of a large batch of 6"):
        build(tmp_path, choose=CoresetConfig(keep=7), source_key="kind")
    with pytest.raises(UsageError, match=r"only `datatools train` makes clusters.*source_key="):
        build(tmp_path, choose=CoresetConfig(keep=3, clusters=2), source_key=None)
    with pytest.raises(UsageError, match="large_batch is 9, but per_device_train_batch_size"):
        build(tmp_path, choose=CoresetConfig(keep=3, large_batch=9), source_key="kind")

    class Packing(TrainingArguments):
        packing = True

    with pytest.raises(UsageError, match="packing joins rows into one"):
        CoresetTrainer(model=tiny(), args=Packing(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
                       train_dataset=rows_with_sources(), data_collator=pad, **CHOOSE)  # fmt: skip

    def packed(rows):
        batch = pad(rows)
        n, width = batch["input_ids"].shape
        return batch | {"position_ids": torch.arange(width).remainder(4).expand(n, -1)}

    made = build(tmp_path, **CHOOSE)
    made.data_collator.inner = packed
    before = weights(made).clone()
    with pytest.raises(UsageError, match="the batch contains packed rows"):
        made.train()
    assert torch.equal(weights(made), before)

    def flattened(rows):
        return {key: torch.tensor([[number for row in rows for number in row[key]]]) for key in ("input_ids", "labels")}

    made = build(tmp_path, choose=CHOOSE["choose"], source_key=None)
    made.data_collator.inner = flattened
    with pytest.raises(UsageError, match=r"packed rows \(6 examples in 1\).*a collator that pads"):
        made.train()
    made = build(tmp_path, **CHOOSE)
    made.data_collator.inner = lambda rows: pad(rows) | {"pixel_values": torch.zeros(len(rows), 3)}
    with pytest.raises(UsageError, match="the batch has 'pixel_values'; choices read only text"):
        made.train()
    made = build(tmp_path, **CHOOSE)
    made.data_collator.number.pop("rare")
    with pytest.raises(UsageError, match="a row of the training batches has no 'kind'"):
        made.train()
    saved_without = build(tmp_path / "plain", Trainer)
    saved_without.train()
    with pytest.raises(DataError, match="was saved without a coreset"):
        build(tmp_path / "x", **CHOOSE).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


def two_runs(folder):
    """On each rank: the weights after training, twice, and how many of its rows each monitored step kept."""
    found = []
    for name in ("a", "b"):
        made = build(f"{folder}/{name}", ddp_backend="gloo", gradient_accumulation_steps=1, save_strategy="no",
                     num_train_epochs=1, **CHOOSE)  # fmt: skip
        made.train()
        watched = [e for e in made.state.log_history if "match_error" in e]
        found.append((weights(made), [sum(e["kept_by_source"].values()) for e in watched]))
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_agree_and_repeat_themselves(tmp_path):
    (first, kept), *others = [run for rank in run(two_runs, 2, tmp_path, str(tmp_path)) for run in rank]
    assert kept == [3, 3] and all(torch.equal(first, other) for other, _ in others)


def test_trl_s_sft_trainer(tmp_path):
    """TRL's own Trainer, where it is installed: prompt and completion, resumed in mid-epoch; packing refused."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.tiny import save_tiny_model

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list([
        {"prompt": f"question {i} ", "completion": "answer" * (1 + i % 3), "kind": f"s{i % 2}" if i % 9 else "rare"}
        for i in range(24)
    ])  # fmt: skip

    class CoresetSFTTrainer(CoresetMixin, trl.SFTTrainer):
        pass

    def made(out, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = LlamaForCausalLM.from_pretrained(folder)
        arguments = trl.SFTConfig(output_dir=str(tmp_path / out), per_device_train_batch_size=6, max_steps=4,
                                  save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
                                  logging_steps=1, **changes)  # fmt: skip
        return CoresetSFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **CHOOSE)

    whole = made("a")
    whole.train()
    assert [e["step"] for e in whole.state.log_history if "match_error" in e] == [1, 3]
    again = made("b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(UsageError, match="packing joins rows"):
        made("c", packing=True)


# ----------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("name", ["coreset.json", "metrics.jsonl"])
def test_values_of_another_type_are_told(first, name):
    assert damage.check(coreset_report.render, first / name, 25)


def test_the_report_says_what_happened(first):
    page = (first / "report.html").read_text()
    assert "Does choosing rows have an effect?" in page and "<script" not in page
    assert 'style="width:100.00%"' in page, "bars use the width that there is"
    assert 'data-of="kept of drawn"' in page, "a narrow page names the numbers"
    for text in ("rare", "small: all kept", "share of kept rows", "choosing took", "herding",
                 "random rows, same sources and quotas"):  # fmt: skip
        assert text in page, text
    assert re.search(r"The process used up to [\d.]+\s[MG]B of memory, choosing included", page)
    assert page.count("<svg") == 3 and page.count('class="range other"') == 1
    assert coreset_report.render(first).read_text() == page, "drawn again from the files alone"


def test_the_report_warns_and_shows_hostile_names_harmlessly(first, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    lines = metrics(run)
    for entry in lines:
        if "match_error" in entry:
            entry["step"] *= 40
            entry["match_error"] = entry["match_error_random"]
    facts = json.loads((run / "coreset.json").read_text())
    choose = CoresetConfig(**facts["settings"])
    monitored = coresets.monitored(lines)
    found = coresets.facts(choose, ["<script>alert(1)</script>", "b\u202ec"], monitored)
    assert "no better than random" in found["warning"]
    files.write_text(run / "coreset.json", json.dumps(found))
    page = coreset_report.render(run).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "no better than random" in page
    control = coresets.facts(choose.model_copy(update={"method": "random_in_source"}), ["a"], monitored)
    assert control["warning"] is None, "the control is not blamed for being random"


@pytest.mark.parametrize("change, words", [
    (lambda entry: {"overflows": entry["step"]}, "filled every batch, so nothing was chosen: both errors"),
    (lambda entry: {"overflows": 7}, "small sources alone filled 7 of 10 batches, whose rows are random"),
    (lambda entry: {"match_error": math.nan, "match_error_random": math.nan}, "has a finite matching error"),
    (lambda entry: {"match_error": math.nan} if entry["step"] == 4 else {}, "(without 1 monitored step whose error"),
    (lambda entry: {"match_error": 0.0, "match_error_random": 0.0}, "no step had rows to choose from"),
])  # fmt: skip
def test_errors_that_say_nothing_about_the_choice_are_called_so(first, tmp_path, change, words):
    """Small sources that fill the batches, errors that are not finite, batches that are kept whole."""
    told = []
    coreset_report.render(first, told.append)
    assert len(told) == 1 and "small sources" not in told[0]
    run = shutil.copytree(first, tmp_path / "run")
    lines = [{**e, **change(e)} if "match_error" in e else e for e in metrics(run)]
    files.write_text(run / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in lines))
    page = coreset_report.render(run, told.append).read_text()
    assert words in told[1]
    assert words.split(" rows")[0] in page and ">nan" not in page and 'nan"' not in page


def test_a_damaged_file_is_named(first, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    files.write_text(run / "metrics.jsonl", "{")
    with pytest.raises(DataError, match=r"metrics\.jsonl: damaged"):
        coreset_report.render(run)


def test_the_warning_appears_while_training_and_the_terminal_is_clean(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "not_better", lambda entries: f"after {len(entries)} in vain")
    train.run(settings(world, tmp_path / "run", training=TrainingConfig(max_steps=2), lora=None))
    text = capsys.readouterr().err
    assert text.count("warning: after 1 in vain") == 1
    assert "40 rows, 2 optimizer steps of 8 rows" in text, "no word of epochs that are not finished"
    assert "model shards" not in text, "transformers' bars are off while weights are saved"
