"""Settings of a short run with coresets, and what it measured."""

import json

from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import CoresetConfig, TrainConfig

LORA = LoraConfig(rank=4, dropout=0.1)


def settings(world, out, **changes):
    """Ten steps, five an epoch: 4 rows kept of 8."""
    values = {
        "model": ModelConfig(name=str(world.model)),
        "data": DataConfig(paths=[str(world.folder / "mixed.jsonl")]),
        "out": out,
        "lora": LORA,
        "training": TrainingConfig(epochs=2, micro_tokens=160),
        "coreset": CoresetConfig(keep=4, large_batch=8, monitor_every=3),
    }
    return TrainConfig(**values | changes)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
