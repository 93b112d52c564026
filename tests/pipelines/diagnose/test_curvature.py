"""Rules that read curvature, trained by `datatools train`: no hook to write, and resumable to the bit."""

import json
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

import optim
from optim import RULES, UpdateMap
from optim.curvature import CurvatureRule
from pipelines.models import load as models
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import checkpoint_files, train

RATES = {"sophia_g": 1e-3, "sophia_h": 1e-3, "adahessian": 2e-2}
ENTRY = {"sophia_g": "hessian", "sophia_h": "hessian", "adahessian": "exp_hessian_diag_sq"}


def settings(world, out, name, *, lora=4, dropout=0.1, dtype="auto", save_steps=3, **changes):
    """5 steps of 12 rows, in micro-batches, refreshing at 0, 2, 4 (Sophia-G at 2, 4)."""
    options = {"optimizer": name, "optimizer_options": {"refresh_every": 2}, "learning_rate": RATES[name]}
    return TrainConfig(
        model=ModelConfig(name=str(world.model), dtype=dtype),
        data=DataConfig(paths=[str(world.pool)]),
        out=out,
        save_steps=save_steps,
        lora=None if lora is None else LoraConfig(rank=lora, dropout=dropout),
        training=TrainingConfig(**options | {"epochs": 1, "batch_size": 12, "micro_tokens": 600} | changes),
    )


def saved_optimizer(run):
    return torch.load(checkpoint_files.checkpoints(run / "checkpoints")[-1] / "optimizer.pt", weights_only=True)


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A model trained in all its weights by Sophia-G."""
    return train.run(settings(world, tmp_path_factory.mktemp("runs") / "whole", "sophia_g", lora=None))


def test_the_table_here_is_complete():
    assert {name for name, rule in RULES.items() if issubclass(rule, CurvatureRule)} == set(RATES)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sophia_g", "lora"), ("sophia_h", "all weights"), ("adahessian", "lora"), ("sophia_h", "bfloat16")],
)
def test_training_lowers_the_loss_with_curvature(world, tmp_path, name, kind):
    """Every parameter gets curvature, in float32 and at the steps that its rule says."""
    changes = {"lora": 4 if kind == "lora" else None, "dtype": "bfloat16" if kind == "bfloat16" else "auto"}
    run = train.run(settings(world, tmp_path / "run", name, save_steps=5, **changes))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0]
    states = saved_optimizer(run)["state"]
    assert states and all(float(state["step"]) == 5 for state in states.values())
    for state in states.values():
        assert state[ENTRY[name]].dtype == torch.float32
        assert state[ENTRY[name]].isfinite().all() and state[ENTRY[name]].abs().sum() > 0
        assert name != "adahessian" or float(state["hessian_step"]) == 3


@pytest.mark.parametrize("name", sorted(RATES))
def test_a_resumed_run_ends_with_the_same_bits(world, tmp_path, name):
    """Stopped before the refresh at step 4: its count comes from the optimizer's state, its probes from the count."""
    config = settings(world, tmp_path / "run", name)
    run = train.run(config)
    before = adapter(run)
    kept, *later = checkpoint_files.checkpoints(run / "checkpoints")
    assert kept.name == "checkpoint-3"
    for path in (*later, run / "adapter"):
        checkpoint_files._set_aside(path)
    train.run(config)
    after = adapter(run)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_micro_batches_change_curvature_by_rounding_only(world, tmp_path):
    """One pass over the whole batch, or several: the same sum."""
    found = []
    for micro_tokens in (120, 100_000):
        changes = {"micro_tokens": micro_tokens, "max_steps": 1, "dropout": 0.0, "save_steps": 1}
        found.append(saved_optimizer(train.run(settings(world, tmp_path / str(micro_tokens), "sophia_h", **changes))))
    for index, state in found[0]["state"].items():
        torch.testing.assert_close(state["hessian"], found[1]["state"][index]["hessian"], rtol=1e-3, atol=1e-6)


def test_a_refresh_leaves_gradients_and_the_dropout_of_the_step_alone(world, tmp_path, monkeypatch):
    """With curvature that is thrown away, training ends as without any refresh."""
    ends = []
    module = import_module("optim.curvature.refresh")
    for owner, name, replacement in (
        (module, "absorb", lambda *args: None),
        (optim.curvature, "refresh", lambda *args, **kwargs: False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            ends.append(adapter(train.run(settings(world, tmp_path / name, "sophia_h", max_steps=3))))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_features_read_the_curvature_and_never_renew_it(whole):
    """A map of a trained optimizer: directions of single rows, clipped by the curvature that training left."""
    params = dict(models.load(ModelConfig(name=str(whole / "model"))).model.named_parameters())
    update_map = UpdateMap.from_state_dict(saved_optimizer(whole), params)
    before = {name: state["hessian"].clone() for name, state in update_map.states.items()}
    generator = torch.Generator().manual_seed(0)
    grads = {n: 1e-4 * torch.randn((3, *p.shape), generator=generator) for n, p in params.items()}
    directions = update_map.per_sample(grads)
    assert all(torch.equal(before[n], update_map.states[n]["hessian"]) for n in before)
    unclipped = 0
    for name, direction in directions.items():
        rule, state = update_map.rules[name], update_map.states[name]
        b1 = rule.betas[0]
        m = b1 * state["exp_avg"].double() + (1 - b1) * grads[name].double()
        want = m.sign() * (m.abs() / (rule.rho * state["hessian"].double() + rule.eps)).clamp(max=1)
        torch.testing.assert_close(direction.double(), want, rtol=1e-3, atol=1e-4)
        unclipped += int((direction.abs() < 1).sum())
    assert unclipped > 0


@pytest.mark.parametrize("name", sorted(RATES))
def test_the_command_line_trains_them(command, world, tmp_path, name):
    argv = world.argv("train", "--optimizer", name, "--set", "training.optimizer_options.refresh_every=2", out=tmp_path)
    done = command(*argv, "--set", "training.batch_size=20", "--overwrite")
    assert done.code == 0, done.stderr
    assert any(state[ENTRY[name]].any() for state in saved_optimizer(tmp_path)["state"].values())
