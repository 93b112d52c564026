"""Settings of a short run, and what must not change in it."""

import json

import torch

from datatools import files
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


def result(run):
    """Everything that a kill must not change: weights, optimizer state, generator states, logged numbers."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(entry.pop("tokens_per_second") > 0 for entry in entries), "the one number that a clock makes"
    found = {"metrics": "\n".join(map(json.dumps, entries))}
    for path in sorted([*run.glob("adapter/*"), *run.glob("model/*"), *run.glob("checkpoints/checkpoint-*[0-9]/*")]):
        if path.suffix in (".safetensors", ".pt", ".pth"):
            found[str(path.relative_to(run))] = files.digest_file(path)
    return found
