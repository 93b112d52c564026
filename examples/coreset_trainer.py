"""Coresets inside transformers.Trainer, with `CoresetMixin` in front of it.

`per_device_train_batch_size` is the size of the large batch.

Run: python examples/coreset_trainer.py
"""

import tempfile

import tiny
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from pipelines.colm import CoresetConfig, CoresetMixin


class CoresetTrainer(CoresetMixin, Trainer):
    """A Trainer that trains each step on a coreset of its batch."""


rows = [
    {"input_ids": row, "labels": row, "source": "web" if i % 8 else "code"}
    for i, row in enumerate(tiny.rows(64).tolist())
]

with tempfile.TemporaryDirectory() as scratch:
    trainer = CoresetTrainer(
        model=tiny.model(),
        args=TrainingArguments(scratch, per_device_train_batch_size=16, max_steps=3, report_to="none", logging_steps=1),
        train_dataset=Dataset.from_list(rows),
        choose=CoresetConfig(keep=8),
        source_key="source",
    )
    trainer.train()
