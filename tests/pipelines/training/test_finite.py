"""Gradients, losses and weights that are not finite: the step is skipped, nothing rotten is saved or gone on from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from datatools import DataError
from pipelines.colm import CoresetMixin
from pipelines.models import finite
from pipelines.select import run as select
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig, TrainConfig
from pipelines.training import checkpoint_files, train, trainer


def settings(world, out, **changes):
    """A run of 9 steps, 3 an epoch, with a checkpoint every second."""
    values = {
        "model": ModelConfig(name=str(world.model)),
        "data": DataConfig(paths=[str(world.folder / "few.jsonl")]),
        "out": out,
        "lora": LoraConfig(rank=4, dropout=0.1),
        "training": TrainingConfig(epochs=3, batch_size=8, micro_tokens=160),
        "save_steps": 2,
    }
    return TrainConfig(**values | changes)


@pytest.fixture
def poison(monkeypatch):
    """`poison(2, 5)`: one entry of the gradients of these steps becomes `value`; `stop`: that step is never reached."""

    def spoil(*steps, value=float("nan"), stop=None):
        def backward(self, loss):
            if self.state.global_step + 1 == stop:
                raise KeyboardInterrupt
            self.accelerator.backward(loss)
            if self.state.global_step + 1 in steps:
                next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = value
            return float(loss.detach())

        monkeypatch.setattr(trainer.DataTrainer, "_backward", backward)

    return spoil


@pytest.fixture
def bad_loss(monkeypatch):
    """`bad_loss(2, 5)`: the losses of these steps are NaN."""

    def spoil(*steps):
        inner, losses, now = trainer.DataTrainer.training_step, trainer.token_losses, []

        def step(self, *args, **kwargs):
            now[:] = [self.state.global_step + 1]
            return inner(self, *args, **kwargs)

        def token_losses(module, batch):
            values, where = losses(module, batch)
            return values * (torch.nan if now[0] in steps else 1), where

        monkeypatch.setattr(trainer.DataTrainer, "training_step", step)
        monkeypatch.setattr(trainer, "token_losses", token_losses)

    return spoil


def metrics(run):
    def refuse(value):
        raise AssertionError(f"{value} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run):
    found = {"losses": [entry["loss"] for entry in metrics(run)]}
    for path in sorted([*run.glob("adapter/*"), *run.glob("model/*"), *run.glob("checkpoints/checkpoint-*[0-9]/*")]):
        if path.suffix in (".safetensors", ".pt", ".pth"):
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def all_finite(folder):
    weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
    assert weights and all(value.isfinite().all() for path in weights for value in load_file(path).values())


PATHS = {
    "adapter": {},
    "full": {"lora": None},
    "unclipped": {"training": TrainingConfig(epochs=3, batch_size=8, gradient_clip=None)},
    "sgd with momentum and decay": {
        "training": TrainingConfig(
            epochs=3, batch_size=8, optimizer="sgd", optimizer_options={"momentum": 0.9}, weight_decay=0.1
        )
    },
    "muon": {"training": TrainingConfig(epochs=3, batch_size=8, optimizer="muon"), "lora": None},
    "sophia": {"training": TrainingConfig(epochs=3, batch_size=8, optimizer="sophia_g")},
    "coreset": {"coreset": CoresetConfig(keep=4, large_batch=8, small=[]), "training": TrainingConfig(epochs=3)},
}


@pytest.mark.parametrize(
    "path, value",
    [("adapter", float("inf")), ("adapter", 1e30), *((path, float("nan")) for path in PATHS)],
    ids=["inf", "a norm that overflows", *PATHS],
)
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(world, tmp_path, poison, capsys, path, value):
    """Every way of training goes through one step; a gradient whose norm overflows would be clipped to zero."""
    poison(2, 5, value=value)
    run = train.run(settings(world, tmp_path / "run", **PATHS[path]))
    entries = metrics(run)
    assert [entry.get("skipped", False) for entry in entries] == [k in (2, 5) for k in range(1, 10)]
    assert all(entry["loss"] is not None for entry in entries) and entries[1]["grad_norm"] is None
    all_finite(run / ("model" if "lora" in PATHS[path] else "adapter"))
    said = capsys.readouterr().err
    assert said.count("the step is skipped") == 2 and "the gradient of step 2 is not finite" in said
    assert "few.jsonl:" in said and "2 of 9 steps were skipped" in said


def test_a_skipped_step_moves_nothing(world, tmp_path, poison):
    """Not the weights, by decay or momentum, nor the optimizer's state: the run of one epoch less its second step."""
    poison(2)
    recipe = TrainingConfig(epochs=1, batch_size=8, weight_decay=0.1)
    run = train.run(settings(world, tmp_path / "run", training=recipe, save_steps=1))
    one, two = (run / "checkpoints" / f"checkpoint-{k}" for k in (1, 2))
    for name in ("adapter_model.safetensors",):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    before, after = (torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in (one, two))
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


def test_too_many_in_a_row_stop_the_run_and_leave_sound_checkpoints(world, tmp_path, poison):
    poison(*range(4, 10))
    recipe = TrainingConfig(epochs=3, batch_size=8, nonfinite_steps=3)
    with pytest.raises(DataError, match=r"the gradient of step 6 is not finite .*few\.jsonl:\d+.* the 2 steps before"):
        train.run(settings(world, tmp_path / "run", training=recipe))
    assert not (tmp_path / "run" / "adapter").exists()
    for path in checkpoint_files.checkpoints(tmp_path / "run" / "checkpoints"):
        all_finite(path)


def test_a_run_of_skipped_steps_only_is_no_success(world, tmp_path, poison):
    poison(1, 2)
    with pytest.raises(DataError, match="the gradient of step 2"):
        train.run(settings(world, tmp_path / "run", training=TrainingConfig(max_steps=2, batch_size=8)))


def test_losses_that_are_not_finite_are_skipped_alike(world, tmp_path, bad_loss, capsys):
    bad_loss(3)
    run = train.run(settings(world, tmp_path / "run"))
    entries = metrics(run)
    assert [entry["step"] for entry in entries if entry["loss"] is None] == [3], "and not those after it"
    assert "the loss of step 3 is nan" in capsys.readouterr().err
    all_finite(run / "adapter")


@pytest.mark.parametrize("options", [{}, {"estimator": "forward"}, {"first_order_layers": 1}], ids=str)
def test_zeroth_order_skips_too(world, tmp_path, bad_loss, options):
    bad_loss(2)
    recipe = TrainingConfig(epochs=1, batch_size=8, gradient="zo", optimizer="sgd", zo=options, learning_rate=1e-4)
    run = train.run(settings(world, tmp_path / "run", training=recipe, lora=None))
    assert [entry.get("skipped", False) for entry in metrics(run)] == [False, True, False]
    steps = [json.loads(line)["step"] for line in (run / "zeroth_order.jsonl").read_text().splitlines()]
    assert steps == [1, 3]
    all_finite(run / "model")


def test_a_resumed_run_skips_the_same_steps_and_counts_on(world, tmp_path, poison):
    poison(2, 5)
    whole = train.run(settings(world, tmp_path / "whole"))
    for stop in (4, 8):
        poison(2, 5, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(world, tmp_path / "run"))
    poison(2, 5)
    train.run(settings(world, tmp_path / "run"))
    assert result(tmp_path / "run") == result(whole)
    marks = [[entry.get("skipped", False) for entry in metrics(run)] for run in (tmp_path / "run", whole)]
    assert marks[0] == marks[1]


def test_steps_in_a_row_are_counted_across_a_restart(world, tmp_path, poison):
    recipe = TrainingConfig(epochs=3, batch_size=8, nonfinite_steps=3)
    poison(4, 5, 6, stop=5)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(world, tmp_path / "run", training=recipe))
    poison(4, 5, 6)
    with pytest.raises(DataError, match="step 6"):
        train.run(settings(world, tmp_path / "run", training=recipe))


def test_weights_that_are_not_finite_stop_at_once_and_are_never_saved(world, tmp_path, monkeypatch):
    """An update that overflows, where loss and gradient were finite: no checkpoint, no adapter, the tensor's name."""

    def rot_weights(self):
        if self.state.global_step == at:
            self.optimizer.param_groups[0]["params"][3].data.view(-1)[1] = torch.inf

    monkeypatch.setattr(trainer.DataTrainer, "_count_step", rot_weights)
    for at, save, text in (
        (4, 2, r"after step 4, \S*lora_\S+ is not finite"),
        (3, 2, r"the loss of step 4 is nan.* the weight \S*lora_\S+ is not finite"),
        (9, 4, r"after step 9, \S*lora_\S+ is not finite"),
    ):
        out = tmp_path / f"{at}"
        with pytest.raises(DataError, match=text):
            train.run(settings(world, out, save_steps=save))
        assert not (out / "adapter").exists()
        for path in (out / "checkpoints").glob("checkpoint-*"):
            assert checkpoint_files.is_complete(path)
            all_finite(path)


def test_an_optimizer_state_that_is_not_finite_is_no_checkpoint(world, tmp_path, monkeypatch):
    def rot_state(self):
        next(iter(self.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = torch.nan

    monkeypatch.setattr(trainer.DataTrainer, "_count_step", rot_state)
    with pytest.raises(DataError, match=r"the optimizer's state of \S*lora_A\S*, exp_avg_sq is not finite"):
        train.run(settings(world, tmp_path / "run", save_steps=1))
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def rot(folder, name):
    """A NaN in the saved file, sealed again, as a version without the check would have left it."""
    path = folder / name
    if name.endswith(".pt"):
        saved = torch.load(path, weights_only=True)
        saved["state"][0]["exp_avg"].view(-1)[0] = torch.nan
        torch.save(saved, path)
    else:
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] = torch.nan
        save_file(weights, path, {"format": "pt"})
    checkpoint_files.mark_complete(folder)
    assert checkpoint_files.is_complete(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_restart_goes_on_before_a_rotten_checkpoint(world, tmp_path, capsys, name):
    whole = train.run(settings(world, tmp_path / "whole"))
    run = shutil.copytree(whole, tmp_path / "run")
    rot(run / "adapter", "adapter_model.safetensors")
    for step in (8, 9):
        rot(run / "checkpoints" / f"checkpoint-{step}", name)
    train.run(settings(world, run))
    assert result(run) == result(whole)
    assert "checkpoint-8: " in (said := capsys.readouterr().err) and "is not finite" in said


def test_a_warm_up_skips_too_and_a_rotten_one_is_made_again(world, tmp_path, poison, capsys):
    poison(2)
    run = select.run(world.select(tmp_path / "run"))
    assert "the gradient of step 2 is not finite" in capsys.readouterr().err
    last = max((run / "warmup").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    rot(last, "adapter_model.safetensors")
    folder = shutil.copytree(run / "warmup", tmp_path / "copy")
    assert last.name not in [path.name for path in checkpoint_files.checkpoints(folder)]


# ------------------------------------------------------------------------------------------------ in another's Trainer


class Spoilt(torch.nn.Module):
    """A linear model whose gradient is NaN on batches with a 1 in their first place."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        out = self.layer(x).squeeze(-1)
        loss = (out - labels).square().mean()
        if bool(x[0, 0] == 1):
            loss = loss + torch.sqrt((self.layer.weight * 0).sum())  # 0, with the gradient inf * 0
        if bool(x[0, 0] == 2):
            loss = loss * torch.nan
        return {"loss": loss}


def rows(marks):
    return [{"x": torch.tensor([float(mark), 0.5]), "labels": torch.tensor(1.0)} for mark in marks]


class Plain(CoresetMixin):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def build(folder, marks, **more):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, num_train_epochs=1, logging_steps=2, report_to="none",
        disable_tqdm=True, use_cpu=True, save_steps=2, logging_nan_inf_filter=False, learning_rate=0.1,
        **more.pop("arguments", {}),
    )  # fmt: skip
    torch.manual_seed(0)
    return Plain(model=Spoilt(), args=arguments, train_dataset=rows(marks), **more)


@pytest.mark.parametrize("mark", [1, 2], ids=["gradient", "loss"])
@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}], ids=["each", "accumulated"])
def test_the_mixin_skips_in_any_trainer_without_a_coreset(tmp_path, mark, arguments):
    made = build(tmp_path, [0, 0, mark, 0, 0, 0, 0, 0], arguments=arguments)
    made.train()
    assert made.skipped_steps == 1
    assert all(p.isfinite().all() for p in made.model.parameters())
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert logged[-1]["skipped_steps"] == 1 and logged[-1]["loss"] == logged[-1]["loss"]


def test_the_mixin_stops_after_a_few_in_a_row(tmp_path):
    made = build(tmp_path, [0] + [1] * 9, nonfinite_steps=3)
    with pytest.raises(DataError, match="the gradient of step 4 is not finite.*learning rate"):
        made.train()
    assert all(p.isfinite().all() for p in made.model.parameters())


def test_states_of_any_shape_are_looked_at():
    assert finite.first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1, 2])), ("c", torch.zeros(0))]) is None
    assert finite.first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, torch.nan]))]) == "b"
    state = {"x": [{"y": torch.tensor(torch.inf)}]}
    assert finite.first_not_finite(finite._leaves("s", state)) == "s, x, 0, y"


def test_a_reference_run_of_order_refuses_a_gradient_that_is_not_finite():
    from datatools.order.problem import Diverged, Problem

    def loss(params, batch):
        return params["w"].square().sum() + torch.sqrt((params["w"] * 0).sum())

    with pytest.raises(Diverged, match="gradient of batch 0 .* not finite"):
        Problem(loss, [None], [None]).gradient({"w": torch.ones(2)}, 0)
