"""`datatools train` as several processes: what one process does, to rounding; killed and resumed to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from datatools import DataError, Order, files
from pipelines.models import load as models
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig, ZerothOrderConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import fit, train, trainer
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


def spoilt(world, folder):
    """On each rank: runs in which one number is NaN on one process only, and one that stops early.

    Returns: of each run what this rank made of it, its weights included.
    """
    own, found = torch.distributed.get_rank(), []
    inner_fit, judge, backward = fit.fit, trainer.DataTrainer._judge_step, trainer.DataTrainer._backward

    def watched(model, *args, **kwargs):
        result = inner_fit(model, *args, **kwargs)
        weights = files.digest(b"".join(p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad))
        skipped = [entry["step"] for entry in result.entries if entry.get("skipped")]
        found.append({"skipped": skipped, "best": result.best, "stopped": result.stopped, "weights": weights})
        return result

    def bad_norm(self):  # after the sum over processes, by which the others would know
        if own == 1 and self.state.global_step + 1 == 3:
            self._norm = torch.tensor(torch.nan)
        judge(self)

    def bad_gradient(self, loss):
        value = backward(self, loss)
        if own == 1 and self.state.global_step + 1 == 3:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
        return value

    fit.fit = watched
    for name, patched, more in (
        ("norm", {"_judge_step": bad_norm}, {}),
        ("gradient", {"_backward": bad_gradient}, {}),
        ("stops", {}, {"training": TrainingConfig(epochs=4, batch_size=8, learning_rate=1.0), "patience": 1}),
    ):
        for attribute, value in ({"_judge_step": judge, "_backward": backward} | patched).items():
            setattr(trainer.DataTrainer, attribute, value)
        validated = {"eval_data": [str(world.test)], "eval_every": 2}
        train.run(settings(world, "adamw", folder / name).model_copy(update=validated | more))
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_skip_validate_and_stop_as_one(world, tmp_path):
    """What is not finite on one process is skipped by all; the best step and the end are the same on all."""
    one, two = run(spoilt, 2, tmp_path, world, tmp_path)
    assert one == two
    norm, gradient, stops = one
    assert norm["skipped"] == gradient["skipped"] == [3]
    assert norm["best"] and gradient["best"] and stops["stopped"] and stops["best"][0] in (2, 4, 6)
    with pytest.raises(DataError, match=r"numerics\.processes was 2, is none.*use torchrun --nproc-per-node 2"):
        train.run(
            settings(world, "adamw", tmp_path / "norm").model_copy(
                update={"eval_data": [str(world.test)], "eval_every": 2}
            )
        )
