"""`datatools train --gradient zo` on a tiny model: any optimizer, resume and replay to the bit, refusals."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from datatools import UsageError
from optim import SGD
from optim.zeroth_order import NotFinite, Taken, ZerothOrder
from pipelines.models import load as models
from pipelines.models.losses import collate, token_losses
from pipelines.runs.seeds import derive_seed
from pipelines.settings.load import load_config
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import train, zeroth_order
from tests.pipelines.conftest import make_world

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("world"))
    lines = made.pool.read_text().splitlines(keepends=True)
    (made.folder / "few.jsonl").write_text("".join(lines[:16]))
    return made


def settings(world, out, *, lora=None, save_steps=2, **training):
    values = {"gradient": "zo", "optimizer": "sgd", "learning_rate": 1e-3, "batch_size": 8, "epochs": 3,
              "micro_tokens": 160} | training  # fmt: skip
    return TrainConfig(
        model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.folder / "few.jsonl")]), out=out,
        lora=lora, training=TrainingConfig(**values), save_steps=save_steps,
    )  # fmt: skip


def saved(out, name="model"):
    return load_file(next((out / name).glob("*.safetensors")))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_replays_from_its_seeds_and_numbers(world, tmp_path):
    """zeroth_order.jsonl and the learning rates alone give the trained weights, bit for bit."""
    config = settings(world, tmp_path / "run", zo={"q": 2, "sparsity": 0.5}, save_steps=None)
    train.run(config)
    model = models.load(config.model).model.requires_grad_(True)
    seed = derive_seed(derive_seed(0, "training") % 2**32, "zeroth order")
    source = ZerothOrder(model.named_parameters(), q=2, sparsity=0.5, seed=seed)
    optimizer = SGD(model.parameters(), lr=0.0)
    metrics, taken = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "zeroth_order.jsonl")
    assert len(metrics) == len(taken) == STEPS and len(taken[0]["seeds"]) == 2
    for metric, entry in zip(metrics, taken, strict=True):
        optimizer.param_groups[0]["lr"] = metric["learning_rate"]
        source.replay(optimizer, [Taken(entry["step"] - 1, entry["seeds"], entry["projected_grad"], entry["kept"])])
    want = saved(tmp_path / "run")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), want[name], rtol=1e-6, atol=1e-7)  # rates have 8 digits in the file


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"optimizer": "adamw", "zo": {"sparsity": 0.3, "mask_steps": 3}},
        {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "zo": {"blocks": "layer"}},
    ],
    ids=["mezo", "adam_sparse", "momentum_blocks"],
)
def test_resumed_is_the_same_to_the_bit(world, tmp_path, training):
    """Stopped after a checkpoint in the middle of an epoch, and gone on."""
    train.run(settings(world, tmp_path / "whole", **training))
    train.run(settings(world, tmp_path / "cut", **training))
    shutil.rmtree(tmp_path / "cut" / "model")
    for late in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"checkpoint-{late}")
    train.run(settings(world, tmp_path / "cut", **training))
    whole, cut = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for name in ("metrics.jsonl", "zeroth_order.jsonl"):
        texts = [(tmp_path / run / name).read_text() for run in ("whole", "cut")]
        one, two = (re.sub(r', "tokens_per_second": [0-9.]+', "", text) for text in texts)
        assert one == two


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "muon", "zo": {"estimator": "one-sided"}},
        {"optimizer": "lion", "zo": {"sign": "elementwise"}},
        {"zo": {"conserve": True, "restore": "copy"}},
        {"zo": {"first_order_layers": 1}},
        {"zo": {"estimator": "forward"}},
        {"zo": {"blocks": "module", "block_order": "joint"}},
        {"optimizer": "adamw", "zo": {"sparsity": 0.5, "sparse_by": "global"}},
    ],
    ids=str,
)
def test_estimators_and_optimizers_train(world, tmp_path, training):
    """Every weight is finite, and some have moved; the loss of each step is a number."""
    config = settings(world, tmp_path / "run", save_steps=None, epochs=1, **training)
    before = {n: p.detach().clone() for n, p in models.load(config.model).model.named_parameters()}
    train.run(config)
    after = saved(tmp_path / "run")
    assert all(after[n].isfinite().all() for n in before) and any(not torch.equal(after[n], before[n]) for n in before)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_the_forward_gradient_of_the_pipeline_is_the_directional_derivative(world):
    """Through the real model's loss: against back-propagation."""
    config = settings(world, world.folder)
    model = models.load(config.model).model.requires_grad_(True).double()
    batch = collate([([1, 5, 9, 4, 7], [-100, 5, 9, 4, 7]), ([3, 2, 8], [-100, -100, 8])])

    def loss():
        return token_losses(model, batch)[0].sum() / 5

    source = ZerothOrder(model.named_parameters(), estimator="forward", module=model)
    source.step(SGD(model.parameters(), lr=0.0), [loss])
    grads = torch.autograd.grad(loss(), list(model.parameters()))
    slope = 0.0
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        z = torch.zeros_like(p, requires_grad=False)
        source.add_direction_(name, z, 1.0, source.last.seeds[0], 0)
        slope += float((grad * z).sum())
    assert source.last.projected_grad[0] == pytest.approx(slope, rel=1e-5)  # logits are float32


def test_adapters_train_alone(world, tmp_path):
    train.run(settings(world, tmp_path / "run", lora=LoraConfig(rank=2, dropout=0.5), zo={"eps": 1e-2}))
    assert any(p.abs().sum() > 0 for name, p in saved(tmp_path / "run", "adapter").items() if "lora_B" in name)


def test_names_to_blocks():
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
             "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]  # fmt: skip
    layer, module = zeroth_order.block_by("layer"), zeroth_order.block_by("module")
    assert [layer(n) for n in names] == ["model.embed_tokens", "model.layers.0", "model.layers.0", "model.layers.1",
                                         "model.norm", "lm_head"]  # fmt: skip
    assert [module(n) for n in names[1:4]] == ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp"]
    assert zeroth_order.after_layer(names, 1) == set(names[3:]) and zeroth_order.after_layer(names, 0) == set()
    assert zeroth_order.block_by("none") is None and layer("transformer.h.3.attn.c_attn.weight") == "transformer.h.3"


@pytest.mark.parametrize(
    ("training", "part"),
    [
        ({"optimizer": "sophia_g"}, "sophia_g.*curvature.*back-propagation"),
        ({"optimizer": "adamw", "zo": {"conserve": True}}, "conserve.*plain SGD"),
        ({"zo": {"conserve": True, "blocks": "layer"}}, "conserve.*blocks"),
        ({"zo": {"conserve": True, "first_order_layers": 1}}, "conserve.*first_order_layers"),
        ({"zo": {"first_order_layers": 2}}, "first_order_layers is 2.*2 trained layers"),
    ],
    ids=str,
)
def test_refusals(world, tmp_path, training, part):
    with pytest.raises(UsageError, match=part):
        train.run(settings(world, tmp_path / "run", **training))


def test_a_loss_that_is_not_finite_is_told_apart_from_other_refusals():
    """The trainer skips such a step, naming its rows (`test_finite.py`)."""
    module = nn.Linear(2, 2)
    source = ZerothOrder(module.named_parameters())
    with pytest.raises(NotFinite, match=r"loss of step 4 is nan.*Lower eps"):
        loss = torch.tensor(float("nan"))
        zeroth_order.step(source, SGD(module.parameters(), lr=0.1), [lambda: loss], taken=3, rows=[7, 8])


def test_command(world, command, tmp_path):
    """The flag and settings reach the run; a slip is named with what was probably meant."""
    base = ("train", "--model", str(world.model), "--data", str(world.folder / "few.jsonl"), "--lora-rank", "0",
            "--epochs", "1", "--gradient")  # fmt: skip
    done = command(*base, "zo", "--optimizer", "sgd", "--set", "training.zo.eps=0.01", "--out", tmp_path / "a")
    assert done.code == 0, done.stderr
    assert len(lines(tmp_path / "a" / "zeroth_order.jsonl")) == 2
    replayed = load_config(TrainConfig, tmp_path / "a" / "run.yaml")
    assert replayed.training.gradient == "zo" and replayed.training.zo.eps == 0.01
    slip = command(*base, "zoo", "--out", tmp_path / "b")
    assert slip.code == 2 and "did you mean 'zo'" in slip.stderr
    slip = command(*base, "zo", "--set", "training.zo.epz=1", "--out", tmp_path / "b")
    assert slip.code == 2 and "did you mean 'eps'" in slip.stderr


def test_sixteen_bit_weights_are_warned_of(capsys):
    module = nn.Linear(2, 2).bfloat16()
    zeroth_order.source_of(TrainingConfig(gradient="zo"), module, seed=0)
    assert "weight and others have 16 bits" in capsys.readouterr().err
    zeroth_order.source_of(TrainingConfig(gradient="zo", zo={"restore": "copy"}), module, seed=0)
    assert capsys.readouterr().err == ""
