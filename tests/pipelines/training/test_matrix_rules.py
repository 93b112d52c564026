"""`datatools train` with a rule for matrices: who gets which tensor is printed first, and can be said otherwise."""

import pytest

from datatools import UsageError
from pipelines.settings.parts import DataConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import train
from tests.pipelines.conftest import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world, out, optimizer, **options):
    return TrainConfig(
        model=ModelConfig(name=str(world.model)), data=DataConfig(paths=[str(world.target)]), out=out, lora=None,
        training=TrainingConfig(
            max_steps=2, batch_size=2, optimizer=optimizer, learning_rate=1e-3, optimizer_options=options
        ),
    )  # fmt: skip


def test_groups_are_printed_and_can_be_assigned(world, tmp_path, capsys):
    train.run(settings(world, tmp_path / "run", "normuon", assign={"down_proj": "adamw", "q_proj": {"num_heads": 2}}))
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("group  rule"))
    heads, plain, rest = (line.split() for line in lines[first + 1 : first + 4])
    assert heads[1:4] == ["normuon,", "num_heads", "2"] and heads[-1].endswith("q_proj.weight")
    assert plain[1] == "normuon" and rest[1] == "adamw" and float(rest[2]) == pytest.approx(1.5e-5)


def test_one_group_needs_no_table(world, tmp_path, capsys):
    train.run(settings(world, tmp_path / "run", "adamw"))
    assert "group  rule" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optimizer", "options", "part"),
    [
        ("conda", {"assign": {"no_such_layer": "adamw"}}, "no_such_layer"),
        ("adamw", {"assign": {"q_proj": "adamw"}}, "expected a mapping with keys among"),
        ("root", {"quantile": 2.0}, "quantile"),
    ],
)
def test_settings_that_mean_nothing_are_refused(world, tmp_path, optimizer, options, part):
    with pytest.raises(UsageError, match=rf"training\.optimizer: .*{part}"):
        train.run(settings(world, tmp_path / "run", optimizer, **options))
