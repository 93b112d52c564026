"""`datatools train --order` trains what the order was estimated for, to the bit; contradictions are errors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import optim
from datatools import DataError, Order, UsageError, order
from pipelines.cli.app import main
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.order import kept as kept_files
from pipelines.order import run as pipeline
from pipelines.order.setting import Setting
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import LoraConfig, ModelConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import optimizers, order_recipe, train, trainer
from tests.tiny import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_tiny_model(folder / "model", layers=1, hidden=16)
    write_rows(folder / "data.jsonl", 60)
    return folder


def recorded(world: Path, out: Path, **changes: Any) -> Setting:
    """What the tasks of a run share, with its reference run recorded."""
    kept: list[Setting] = []
    training = OrderTraining.model_validate(
        {"batch_size": 4, "learning_rate": 1e-3, "micro_tokens": 70} | changes.pop("training", {})
    )
    base: dict[str, Any] = {
        "task": "record", "model": ModelConfig(name=str(world / "model")), "out": out, "training": training,
        "data": OrderData(paths=[str(world / "data.jsonl")]), "batches": 4, "held_out": 8, "warmup_steps": 2, "seed": 3,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline.TASKS, "record", kept.append)
        pipeline.run(OrderConfig.model_validate(base | changes))
    kept_files.reference(kept[0])
    return kept[0]


def config(world: Path, out: Path, **changes: Any) -> TrainConfig:
    base = {"model": {"name": str(world / "model")}, "data": {"paths": [str(world / "data.jsonl")]}, "out": out}
    return TrainConfig.model_validate(base | changes)


def flags(world: Path, order_file: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--order", str(order_file),
            "--out", str(out), "--quiet", *more]  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"gradient_clip": 0.3, "weight_decay": 0.1, "schedule": "cosine", "epochs": 2},
    "adam_mini": {"weight_decay": 0.1},
    "muon": {"gradient_clip": 0.3, "learning_rate": 0.02, "optimizer_options": {"momentum": 0.9}},
    "normuon": {"weight_decay": 0.1},
    "lion": {"block_ratios": "paper"},
    "sgd": {"optimizer_options": {"momentum": 0.9}, "learning_rate": 0.1, "decay_all": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize("name", RECIPES)
def test_training_in_the_reference_order_is_the_reference_run(world: Path, tmp_path: Path, name: str) -> None:
    """To the bit, and with no flag but the order: warm-up, optimizer, schedule, clipping, decay, seed and adapters come
    out of the file.
    """
    lora = LoraConfig(rank=2, targets="auto") if name == "adamw" else None
    setting = recorded(world, tmp_path / "order", training=RECIPES[name] | {"optimizer": name}, lora=lora)
    given = tmp_path / "order" / "reference.npz"
    done = train.run(config(world, tmp_path / "new", order=given))
    loaded = models.load(ModelConfig(name=str(world / "model"), dtype="float32"))
    if lora is None:
        loaded = models.load(ModelConfig(name=str(done / "model"), dtype="float32"))
        found = dict(loaded.model.named_parameters())
    else:
        module = load_adapter(loaded.model, done / "adapter")
        found = {n: p for n, p in module.named_parameters() if "lora_" in n}
    end = kept_files.reference(setting).end.params
    assert end.keys() <= found.keys()
    differing = [n for n, p in end.items() if not torch.equal(p, found[n])]
    assert differing == []
    moved = [n for n, p in kept_files.reference(setting).start.params.items() if not torch.equal(p, end[n])]
    assert moved, "it trained"
    assert len((done / "metrics.jsonl").read_text().splitlines()) == 2 + len(setting.sequence), "warm-up and order"
    assert setting.problem.held_out_loss({n: found[n].detach() for n in end}) == kept_files.true_loss(
        setting, setting.sequence
    )


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("orders") / "run"
    recorded(world, out, training={"weight_decay": 0.1, "optimizer_options": {"betas": [0.9, 0.95], "eps": 1e-7}})
    return out / "reference.npz"


@pytest.mark.parametrize(
    "given, said",
    [
        (["--learning-rate", "0.01"], "training.learning_rate is 0.01 here and 0.001 there"),
        (["--optimizer", "lion"], "training.optimizer is lion here and adamw there"),
        (["--schedule", "linear"], "training.schedule is linear here and constant there"),
        (["--lora-rank", "4"], "lora.rank is 4 here and 0 there"),
        (["--seed", "0"], "seed is 0 here and 3 there"),
        (["--weight-decay", "0"], "training.weight_decay is 0.0 here and 0.1 there"),
        (["--batch-size", "8"], "training.batch_size is 8 here and 4 there"),
        (["--epochs", "3"], "training.epochs is 3 here and 1 there"),
        (["--max-length", "64"], "model.max_length is 64 here and none there"),
        (["--set", "training.max_steps=2"], "training.max_steps is 2 here and none there"),
        (["--set", "training.gradient_clip=1"], "training.gradient_clip is 1.0 here and none there"),
        (["--set", "training.optimizer_options.eps=1e-8"], 'training.optimizer_options is {"eps": 1e-08} here'),
        (["--set", "training.warmup_ratio=0.5"], "training.warmup_ratio is 0.5 here and 0.03 there"),
        (["--set", "model.dtype=bfloat16"], "model.dtype is bfloat16 here and float32 there"),
        (["--gradient", "zo"], "training.gradient is zo here and backprop there"),
    ],
)  # fmt: skip
def test_a_setting_that_contradicts_the_order_is_an_error(
    world: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert main(flags(world, made, tmp_path / "new", *given)) == 2
    error = capsys.readouterr().err
    assert f"--order {made} was made for another recipe" in error and said in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_a_setting_in_yaml_contradicts_too_and_one_that_agrees_is_fine(
    world: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("training: {learning_rate: 0.5, optimizer: adamw}\nlora: {rank: 2}\n")
    assert main(flags(world, made, tmp_path / "new", "--config", str(yaml))) == 2
    assert "learning_rate is 0.5 here and 0.001 there; lora.rank is 2 here and 0 there" in capsys.readouterr().err
    agreeing = ["--learning-rate", "1e-3", "--lora-rank", "0", "--seed", "3", "--set", "model.dtype=auto",
                "--set", "training.optimizer_options.betas=[0.9, 0.95]"]  # fmt: skip
    assert main(flags(world, made, tmp_path / "new", *agreeing)) == 0
    assert main(["train", str(tmp_path / "new" / "run.yaml"), "--quiet"]) == 0, "its run.yaml has the whole recipe"
    written = (tmp_path / "new" / "run.yaml").read_text()
    assert "learning_rate: 0.001" in written and "schedule: constant" in written and "lora: null" in written


def test_train_says_what_it_took_over(
    world: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(config(world, tmp_path / "new", order=made))
    said = capsys.readouterr().err
    assert (
        "trains with the recipe for which the order was estimated: adamw, learning rate 0.001, schedule const" in said
    )
    assert "all weights in float32, seed 3, after 2 warm-up steps on other rows" in said


def test_another_model_and_other_tokens_are_refused(world: Path, made: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", layers=1, hidden=16, seed=1)
    other = config(world, tmp_path / "a", order=made, model={"name": str(tmp_path / "model")})
    with pytest.raises(DataError, match=r"was made for another model: model.safetensors is \w+ here and \w+ there"):
        train.run(other)
    write_rows(tmp_path / "data.jsonl", 60, answer="another")
    moved = config(world, tmp_path / "b", order=made, data={"paths": [str(tmp_path / "data.jsonl")]})
    with pytest.raises(DataError, match="has other tokens than when the order was estimated"):
        train.run(moved)


def test_another_optimizer_of_the_same_recipe_is_refused(world: Path, made: Path, tmp_path: Path) -> None:
    given = Order.load(made)
    assert given.recipe is not None
    groups = [dict(group) for group in given.recipe["optimizer"]]
    groups[0]["rule"] = groups[0]["rule"] | {"eps": 1e-3}
    replace(given, recipe=dict(given.recipe) | {"optimizer": groups}).save(tmp_path / "o.npz")
    with pytest.raises(DataError, match=r"builds another optimizer from its recipe \(group 1: rule is .*1e-07.* here"):
        train.run(config(world, tmp_path / "new", order=tmp_path / "o.npz"))
    replace(given, recipe=dict(given.recipe) | {"training": {"learning_rat": 1}}).save(tmp_path / "o.npz")
    with pytest.raises(DataError, match=r"its recipe cannot be used \(training.learning_rat: Extra inputs"):
        train.run(config(world, tmp_path / "new", order=tmp_path / "o.npz"))


def test_an_order_without_a_recipe_trains_by_the_settings_and_says_so(
    world: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(Order.load(made), recipe=None).save(tmp_path / "o.npz")
    own = {"learning_rate": 0.5, "schedule": "constant"}
    done = train.run(config(world, tmp_path / "new", order=tmp_path / "o.npz", lora=None, training=own))
    assert "o.npz contains no recipe" in (said := capsys.readouterr().err) and "if they equal those of" in said
    steps = (done / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 4 and all('"learning_rate": 0.5' in step for step in steps)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_order_and_train_build_the_same_optimizer(name: str) -> None:
    """Same groups, same settings, same first update, for every optimizer whose steps gradients alone replay."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        )
    training = OrderTraining(optimizer=name, learning_rate=0.01, weight_decay=0.1)
    used = optimizers.optimizer_of(training, model)
    if name == "adam_mini":
        assert any(group["rule"].blocks == 8 * 16 for group in used.param_groups), "blocks are heads"
    try:
        recipe = order.Recipe.of(used, [0.01])
    except UsageError as error:
        assert "cannot be replayed from gradients alone" in str(error)
        return
    driver = trainer.DataTrainer.__new__(trainer.DataTrainer)
    driver.optimizer, driver.recipe, driver.model = None, training, model
    built = driver.create_optimizer()
    assert order_recipe.described(built) == order_recipe.described(used)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for n, p in params.items()}
    recipe = replace(recipe, rules={n: recipe.rules[n] for n in params})
    stepped, states = recipe.step(params, recipe.init(params), grads, 0)
    for n, p in model.named_parameters():
        p.grad = grads[n].clone()
    built.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, stepped[n]), n
        assert all(torch.equal(value, built.state[p][key]) for key, value in states[n].items()), n
        assert torch.equal(p, params[n]) == (name == "adopt"), f"{n} moved, unless the first step only measures"
