"""Training in bfloat16 arrives where float32 does, or says what it loses; weight decay spares norms and biases."""

import json

import pytest
import torch
from safetensors.torch import load_file

from optim import without_decay
from pipelines.models import load as models
from pipelines.order import setting as order_setting
from pipelines.settings.parts import LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import optimizers, train
from tests.pipelines.conftest import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world, out, dtype, **training):
    values = {"learning_rate": 1e-5, "epochs": 5, "batch_size": 2, "schedule": "constant"}
    return TrainConfig(
        model=ModelConfig(name=str(world.model), dtype=dtype), data={"paths": [str(world.test)]}, out=out, lora=None,
        training=TrainingConfig(**values | training),
    )  # fmt: skip


def moved(world, run, dtype=torch.bfloat16):
    """How far each tensor moved from the start, in float64."""
    start, end = load_file(world.model / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    return {name: (end[name].double() - value.to(dtype).double()).flatten() for name, value in start.items()}


@pytest.fixture(scope="module")
def exact(world, tmp_path_factory):
    return moved(world, train.run(settings(world, tmp_path_factory.mktemp("exact") / "run", "float32")), torch.float32)


def arrived(exact, rough):
    along = sum(float(move @ rough[name]) for name, move in exact.items())
    return along / sum(float(move @ move) for move in exact.values())


@pytest.mark.parametrize("rounding, low, high", [("auto", 0.9, 1.1), ("nearest", 0.0, 0.5), ("master", 0.99, 1.01)])
def test_updates_of_bfloat16_weights_arrive_or_are_counted(world, exact, tmp_path, capsys, rounding, low, high):
    run = train.run(settings(world, tmp_path / "run", "bfloat16", rounding=rounding))
    rough = moved(world, run, torch.float32 if rounding == "master" else torch.bfloat16)
    assert low < arrived(exact, rough) < high
    said = capsys.readouterr().err
    assert ("of the intended updates arrived, of norms and biases 0%" in said) == (rounding == "nearest")
    if rounding == "nearest":
        share = float(said.split("to the nearest: ")[1].split("%")[0]) / 100
        assert share == pytest.approx(arrived(exact, rough), abs=0.1)
        assert not any(float(move.abs().sum()) for name, move in rough.items() if "norm" in name)
    assert ("are rounded stochastically" in said) == (rounding == "auto")


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "master"])
def test_a_stopped_run_in_bfloat16_ends_with_the_same_bits(world, tmp_path, optimizer, rounding):
    """Stopped after three of five epochs, inside the steps that are measured too."""
    changes = {"optimizer": optimizer, "rounding": rounding, "learning_rate": 1e-4, "max_steps": 6}
    whole = train.run(settings(world, tmp_path / "whole", "bfloat16", **changes))
    part = train.run(settings(world, tmp_path / "part", "bfloat16", **changes))
    for name in ("checkpoint-6", "checkpoint-4"):
        (part / "checkpoints" / name / "complete.json").unlink()
    (part / "model" / "complete.json").unlink()
    resumed = train.run(settings(world, tmp_path / "part", "bfloat16", **changes))
    for name in ("model/model.safetensors", "checkpoints/checkpoint-6/optimizer.pt"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_adapters_on_bfloat16_weights_are_in_float32_and_lose_nothing(world, tmp_path, capsys):
    config = settings(world, tmp_path / "run", "bfloat16").model_copy(update={"lora": LoraConfig(rank=2)})
    run = train.run(config)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert "rounded" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- weight decay


def decayed(optimizer):
    return {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_norms_and_biases_have_no_weight_decay(world, name):
    """As with Trainer and `optim.hf.resolve`, in the one place where training and orders get their optimizer."""
    module = models.load(ModelConfig(name=str(world.model))).model.requires_grad_(True)
    module.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    spared = without_decay([n for n, _ in module.named_parameters()], module)
    names = {n for n, _ in module.named_parameters()}
    recipe = TrainingConfig(optimizer=name, weight_decay=0.1)
    assert decayed(optimizers.optimizer_of(recipe, module)) == names - spared and len(spared) == 6
    everything = recipe.model_copy(update={"decay_all": True})
    assert decayed(optimizers.optimizer_of(everything, module)) == names
    assert len(optimizers.optimizer_of(recipe.model_copy(update={"weight_decay": 0.0}), module).param_groups) == (
        2 if name == "muon" else 1
    )


@pytest.mark.parametrize("gradient", ["backprop", "zo"])
def test_weight_decay_of_a_training_run_leaves_norms_alone(world, tmp_path, gradient):
    """At a learning rate so large that decay shows, on a run whose gradients are clipped to nothing."""
    config = settings(
        world, tmp_path / "run", "float32", optimizer="sgd", learning_rate=1e-2, weight_decay=1.0, epochs=1,
        gradient_clip=1e-9, gradient=gradient, zo={"eps": 1e-3} if gradient == "backprop" else {"sparsity": 0.999999},
    )  # fmt: skip
    run = train.run(config)
    start, end = load_file(world.model / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    for name, value in start.items():
        shrunk = float((end[name] * value).sum() / value.square().sum())
        assert shrunk == pytest.approx(1.0 if "norm" in name else 0.99**2, abs=2e-3), name


def test_the_optimizer_of_an_order_follows_the_same_rule(world, tmp_path, monkeypatch):
    from pipelines.runs.folder import Run
    from pipelines.settings.order import OrderConfig

    made = []
    build = optimizers.optimizer_of
    monkeypatch.setattr(optimizers, "optimizer_of", lambda *args: made.append(build(*args)) or made[-1])
    config = OrderConfig(
        model=ModelConfig(name=str(world.model)), data={"paths": [str(world.pool)]}, out=tmp_path / "run", batches=2,
        held_out=2, warmup_steps=0, training={"batch_size": 2, "weight_decay": 0.1},
    )  # fmt: skip
    with Run(config.out, config, "order") as current:
        order_setting.build(config, current)
    assert made and not any("norm" in name for name in decayed(made[0])) and decayed(made[0])
    assert json.loads((config.out / "provenance.json").read_text())
