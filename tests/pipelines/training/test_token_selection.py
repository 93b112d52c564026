"""Token selection in `datatools train`: which tokens count, against the definition, and what is refused."""

import json

import pytest
import torch

from datatools import DataError, UsageError
from pipelines.models import load as models
from pipelines.models.losses import token_losses
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import DataConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TokensConfig, TrainConfig
from pipelines.training import train
from pipelines.training.token_selection import TokenSelection, measured
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("reference") / "model", seed=5)


def settings(world, out, **changes):
    values = {
        "model": ModelConfig(name=str(world.model)), "data": DataConfig(paths=[str(world.pool)]), "out": out,
        "lora": None, "training": TrainingConfig(max_steps=3, batch_size=8, micro_tokens=160),
    }  # fmt: skip
    return TrainConfig(**values | changes)


def test_the_tokens_with_the_largest_excess_of_each_row_are_kept():
    reference = {7: torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), 3: torch.tensor([0.0, 5.0])}
    losses = torch.tensor([2.0, 9.0, 1.0, 3.0, 3.0, 4.0, 4.0], requires_grad=True)
    where = torch.tensor([0] * 5 + [1] * 2)
    kept, rows = TokenSelection(0.6, reference).keep([7, 3], losses, where)
    assert kept.tolist() == [9.0, 3.0, 3.0, 4.0, 4.0] and rows.tolist() == [0, 0, 0, 1, 1], "3 of 5, and 2 of 2 by 1.2"
    kept.sum().backward()
    assert losses.grad.tolist() == [0, 1, 0, 1, 1, 1, 1]
    half, rows = TokenSelection(0.5, reference).keep([7, 3], losses, where)
    assert half.tolist() == [9.0, 3.0, 3.0, 4.0], "an excess of 4 before one of -1, ties to the earlier token"
    assert TokenSelection(1.0, reference).keep([7, 3], losses, where)[0].tolist() == losses.tolist()


def test_a_step_trains_on_the_kept_tokens_whatever_the_micro_batches(world, reference, tmp_path):
    """The loss of the first step is the mean over the kept tokens of its rows; a share of 1 is plain training."""
    own = TokensConfig(reference=str(reference), share=0.4)
    runs = [
        train.run(
            settings(
                world,
                tmp_path / str(budget),
                tokens=own,
                training=TrainingConfig(max_steps=3, batch_size=60, micro_tokens=budget),
            )
        )
        for budget in (160, 100_000)
    ]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [e["loss"] for e in lines[0]] == pytest.approx([e["loss"] for e in lines[1]], rel=1e-4)
    loaded = models.load(ModelConfig(name=str(world.model)))
    rows = prepare(DataConfig(paths=[str(world.pool)]), ModelConfig(name=str(world.model)), loaded.tokenizer,
                   cache=tmp_path / "cache", label="data")  # fmt: skip
    found = measured(own, ModelConfig(name=str(world.model)), rows, list(range(60)))
    kept = []
    for row in range(60):
        with torch.no_grad():
            losses, _ = token_losses(loaded.model, rows.batch([row]))
        excess = losses - found.reference[row]
        count = -(-len(losses) * 4 // 10)
        kept += [float(losses[i]) for i in sorted(range(len(losses)), key=lambda i: -float(excess[i]))[:count]]
    assert lines[0][0]["loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-4)
    whole = train.run(settings(world, tmp_path / "whole", tokens=TokensConfig(reference=str(reference), share=1)))
    plain = train.run(settings(world, tmp_path / "plain"))
    weights = "model/model.safetensors"
    assert (whole / weights).read_bytes() == (plain / weights).read_bytes()


def test_what_cannot_be_compared_is_refused(world, reference, tmp_path):
    other = tmp_path / "other"
    save_tiny_model(other)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(DataError, match="has other tokens than the model that trains"):
        train.run(settings(world, tmp_path / "a", tokens=TokensConfig(reference=str(other))))
    with pytest.raises(UsageError, match="nowhere"):
        train.run(settings(world, tmp_path / "b", tokens=TokensConfig(reference=str(tmp_path / "nowhere"))))
    with pytest.raises(UsageError, match="--token-reference and --gradient zo exclude each other"):
        train.run(settings(world, tmp_path / "c", tokens=TokensConfig(reference=str(reference)),
                           training=TrainingConfig(gradient="zo", optimizer="sgd")))  # fmt: skip
    for share in (0, 1.2):
        with pytest.raises(ValueError, match="share"):
            TokensConfig(reference="x", share=share)
