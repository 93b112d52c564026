"""`datatools train` as several processes: what one process does, to rounding; killed and resumed to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from datatools import Order
from pipelines.models import load as models
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig, ZerothOrderConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import train
from tests.optim.distributed.processes import run
from tests.pipelines.conftest import make_world

RECIPES = {
    "adamw": TrainingConfig(epochs=2, batch_size=8, micro_tokens=160, learning_rate=1e-2, gradient_clip=1.0),
    "adahessian": TrainingConfig(optimizer="adahessian", epochs=1, batch_size=8, learning_rate=1e-2),
    "zeroth order": TrainingConfig(
        optimizer="sgd", epochs=1, batch_size=8, learning_rate=1e-4, gradient="zo", zo=ZerothOrderConfig(eps=1e-2)
    ),
    "in an order": TrainingConfig(learning_rate=1e-2),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with `few.jsonl`: 25 rows, so that the last batch of an epoch is one row, and an order of 5 steps."""
    made = make_world(tmp_path_factory.mktemp("world"))
    (made.folder / "few.jsonl").write_text("".join(made.pool.read_text().splitlines(keepends=True)[:25]))
    return made


def settings(world, name, out):
    return TrainConfig(
        model=ModelConfig(name=str(world.model)),
        data=DataConfig(paths=[str(world.folder / "few.jsonl")]),
        out=out,
        lora=LoraConfig(rank=4),
        training=RECIPES[name],
        order=world.folder / "order.npz" if name == "in an order" else None,
    )


def trained(world, folder, names):
    """On each rank: these recipes, each in a folder of its own."""
    return [str(train.run(settings(world, name, folder / name.replace(" ", "-")))) for name in names]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_do_what_one_does_and_resume_to_the_bit(world, tmp_path):
    config = settings(world, "adamw", tmp_path)
    tokenizer = models.load(config.model, tokenizer_only=True).tokenizer
    rows = prepare(config.data, config.model, tokenizer, cache=tmp_path / "cache", label="rows")
    ids = list(rows.pool.ids)
    batches = tuple(tuple(ids[5 * b : 5 * b + 5]) for b in range(5))
    Order(batches, (3, 0, 4, 1, 2)).save(world.folder / "order.npz")

    alone = trained(world, tmp_path / "one", RECIPES)
    (together, others) = run(trained, 2, tmp_path, world, tmp_path / "two", list(RECIPES))
    assert together == others
    for one, two in zip(alone, together, strict=True):
        expected = load_file(f"{one}/adapter/adapter_model.safetensors")
        found = load_file(f"{two}/adapter/adapter_model.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5)

    done = tmp_path / "two" / "adamw"
    finished = (done / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(done / "adapter")
    newest = max((done / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    shutil.rmtree(newest)
    run(trained, 2, tmp_path, world, tmp_path / "two", ["adamw"])
    assert (done / "adapter" / "adapter_model.safetensors").read_bytes() == finished
