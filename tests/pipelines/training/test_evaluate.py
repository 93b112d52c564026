"""`datatools evaluate`: the mean over supervised tokens, and its interval."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from datatools import DataError, t_interval
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.rows.prepare import prepare
from pipelines.settings.parts import ModelConfig
from pipelines.settings.train import EvaluateConfig
from pipelines.training import evaluation
from tests.pipelines.training.runs import data_of, plain_losses


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_evaluate_is_the_mean_over_supervised_tokens(world, first, budget):
    """Alone or padded in a batch: what plain torch gives row by row, whole and by source."""
    config = EvaluateConfig(
        model=ModelConfig(name=str(world.model), adapter=first / "adapter"), data=data_of(world), token_budget=budget
    )
    found = evaluation.evaluate(config)
    loaded = models.load(ModelConfig(name=str(world.model)))
    model = load_adapter(loaded.model, first / "adapter")
    rows = prepare(data_of(world), config.model, loaded.tokenizer, cache=world.folder, label="data")
    losses = [plain_losses(model, *rows.item(i)) for i in range(24)]
    assert found["tokens"] == sum(map(len, losses)) and found["rows"] == 24
    assert found["loss"] == pytest.approx(float(torch.cat(losses).double().mean()), abs=1e-6)
    for source, part in found["sources"].items():
        of = torch.cat([x for x, name in zip(losses, rows.pool.sources, strict=True) if name == source])
        assert part["tokens"] == len(of) and part["loss"] == pytest.approx(float(of.double().mean()), abs=1e-6)


def test_evaluate_refuses_a_loss_that_is_not_finite(world, tmp_path):
    from safetensors.torch import save_file

    broken = shutil.copytree(world.model, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"few.jsonl:\d+: the loss is not finite"):
        evaluation.evaluate(EvaluateConfig(model=ModelConfig(name=str(broken)), data=data_of(world)))


def test_intervals_are_student_s():
    """95 % intervals of a mean against numbers from a table: mean +- t s / sqrt(n)."""
    assert t_interval([2.0]) == (2.0, None, None)
    mean, low, high = t_interval([1.0, 2.0, 3.0])  # s = 1, t(2) = 4.303
    assert mean == 2 and high - mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3) == mean - low
    mean, low, high = t_interval([0.1, 0.3])  # s = sqrt(0.02), t(1) = 12.706
    assert high - mean == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2), abs=1e-3)
    for n, t in ((5, 2.776), (11, 2.228), (12, 2.201), (21, 2.086), (31, 2.042), (61, 2.000)):
        values = [float(i % 2) for i in range(n)]
        spread = math.sqrt(sum((v - sum(values) / n) ** 2 for v in values) / (n - 1) / n)
        mean, low, high = t_interval(values)
        assert (high - mean) / spread == pytest.approx(t, abs=3e-3), f"n = {n}"
