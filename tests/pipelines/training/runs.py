"""Settings of a short run, and what must not change in it."""

import torch

from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig

LORA = LoraConfig(rank=4, dropout=0.1)  # dropout: a resumed run must also have the same random numbers


def settings(world, out, **changes):
    """A run of 9 steps, 3 an epoch, in micro-batches of about three rows."""
    values = {
        "model": ModelConfig(name=str(world.model)),
        "data": DataConfig(paths=[str(world.folder / "few.jsonl")]),
        "out": out,
        "lora": LORA,
        "training": TrainingConfig(epochs=3, batch_size=8, micro_tokens=160),
    }
    return TrainConfig(**values | changes)


def plain_losses(model, ids, labels):
    """Losses of the supervised tokens of one row, by torch's own words."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    wanted = torch.tensor(labels)[1:]
    losses = torch.nn.functional.cross_entropy(logits[:-1].float(), wanted, reduction="none", ignore_index=-100)
    return losses[wanted != -100]


def data_of(world):
    return DataConfig(paths=[str(world.folder / "few.jsonl")])
