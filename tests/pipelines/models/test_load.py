"""Loading a model: what a command needs of it is read once."""

import os
from collections import Counter

import pytest
from transformers import AutoTokenizer

from datatools.files import reading
from pipelines.diagnose import run as diagnose
from pipelines.models import load as models
from pipelines.order import run as order
from pipelines.select import run as select
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.order import OrderConfig, OrderData
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import train
from tests.tiny import save_tiny_model


def _select(world, out):
    select.run(world.select(out, method="rds"))


def _train(world, out):
    data = DataConfig(paths=[str(world.target)])
    train.run(TrainConfig(model=ModelConfig(name=str(world.model)), data=data, out=out, lora=LoraConfig(rank=2)))


def _diagnose(world, out):
    data = DataConfig(paths=[str(world.target)])
    diagnose.run(DiagnoseConfig(model=ModelConfig(name=str(world.model)), data=data, out=out, checks=["spectrum"]))


def _order(world, out):
    data = OrderData(paths=[str(world.pool)])
    model = ModelConfig(name=str(world.model))
    order.run(OrderConfig(task="estimate", model=model, data=data, validation=[str(world.target)], out=out, batches=4))


@pytest.mark.parametrize("command", [_select, _train, _diagnose, _order])
def test_a_command_reads_weights_and_tokenizer_once(own_world, tmp_path, monkeypatch, command):
    """Weights are hashed once, however often the model is asked for; the tokenizer is parsed once."""
    for path in own_world.model.iterdir():
        os.utime(path, (0, 0))
    read, tokenizers = Counter(), []
    monkeypatch.setattr(reading, "_SETTLED_NS", -1)
    real = reading.seal_of_open

    def counted(descriptor):
        read[os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))] += 1
        return real(descriptor)

    monkeypatch.setattr(reading, "seal_of_open", counted)
    given = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **options: (tokenizers.append(args), given(*args, **options))[1]
    )
    command(own_world, tmp_path / "run")
    assert read["model.safetensors"] == 1, read
    assert len(tokenizers) == 1


def test_changed_weights_are_another_model(tmp_path):
    """A model that is trained further between two loads of one process does not keep its digest."""
    first = models.load(ModelConfig(name=str(save_tiny_model(tmp_path / "model"))))
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = models.load(ModelConfig(name=str(tmp_path / "model")))
    assert again.digests["model.safetensors"] != first.digests["model.safetensors"]
