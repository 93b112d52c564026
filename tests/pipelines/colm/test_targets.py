"""Methods that read logits, or compare rows with target rows, in `datatools train` and `CoresetMixin`."""

import pytest
import torch

from datatools import DataError, UsageError
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.train import CoresetConfig
from pipelines.training import train
from tests.pipelines.colm.runs import metrics, settings
from tests.pipelines.colm.test_mixin import build, pad, rows_with_sources, strict, weights

SIZES = {"keep": 4, "large_batch": 8, "monitor_every": 2}
STEPS = {"training": TrainingConfig(epochs=2, max_steps=7, micro_tokens=160)}


@pytest.mark.parametrize(
    "method, features",
    [("uds", "exact"), ("uds", "stale"), ("greats", "stale"), ("partition_sel", "exact"), ("opus", "exact")],
)
def test_methods_train_and_are_reported(world, tmp_path, method, features):
    target = [str(world.target)] if method != "uds" else []
    choose = CoresetConfig(**SIZES, method=method, features=features, target=target, target_every=3, target_rows=2)
    run = train.run(settings(world, tmp_path / "run", coreset=choose, **STEPS))
    lines = metrics(run)
    assert len(lines) == 7 and all(e["loss"] > 0 for e in lines)
    assert all(e["match_error"] > 0 for e in lines if "match_error" in e)
    assert method in (run / "report.html").read_text()


def test_a_memory_survives_a_resume(tmp_path):
    own = {"choose": {"keep": 3, "method": "uds"}, "source_key": "kind"}
    whole = build(tmp_path / "a", **own)
    whole.train()
    memory = whole._choosing._colm.memory
    assert memory.shape == (6 * 6 - 2 * 4, 1025), "all rows that were chosen; the 4 rare ones are kept without a look"
    again = build(tmp_path / "b", **own)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again)) and torch.equal(memory, again._choosing._colm.memory)


def test_another_trainer_has_target_rows(tmp_path):
    target = rows_with_sources(4)
    made = build(tmp_path, choose={"keep": 3, "method": "greats"}, source_key="kind", target_dataset=target)
    made.train()
    assert made._choosing._colm.wanted.norm() > 0 and made.state.global_step == 6
    with pytest.raises(UsageError, match="greats compares rows with target rows; name them"):
        build(tmp_path, choose={"keep": 3, "method": "greats"}, source_key="kind")
    with pytest.raises(UsageError, match="herding reads no target rows"):
        build(tmp_path, choose={"keep": 3}, source_key="kind", target_dataset=target)


def test_the_gradient_of_target_rows_survives_a_resume_and_must_be_finite(tmp_path):
    """Columns that the model does not take are removed from target rows, as the loader removes them from others."""
    target = rows_with_sources(9).add_column("text", ["a"] * 9)
    choose = {"keep": 3, "method": "greats", "target_every": 10, "target_rows": 4}
    whole, again = (build(tmp_path / name, choose=choose, source_key="kind", target_dataset=target) for name in "ab")
    for made in (whole, again):
        made.data_collator.inner = strict
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = whole._choosing._colm, again._choosing._colm
    assert torch.equal(ours.wanted, theirs.wanted), "of the first step, not of the step after the resume"
    older = {key: value for key, value in ours.state_dict().items() if key != "wanted"}
    theirs.load_state_dict(older)
    with torch.no_grad():
        theirs.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="mean gradient of the target rows is not finite"):
        theirs.aim(pad([target[0], target[1]]))


def test_what_does_not_fit_is_refused_before_training(world, tmp_path):
    def refused(text, **choose):
        with pytest.raises(UsageError, match=text):
            train.run(settings(world, tmp_path / "bad", coreset=CoresetConfig(**SIZES, **choose)))
        assert not (tmp_path / "bad" / "checkpoints").exists()

    target = [str(world.target)]
    refused("opus compares rows with target rows; name them", method="opus")
    refused("herding reads no target rows; .* use one of: greats, partition_sel, opus", target=target)
    refused("which probes features cannot be compared with", method="greats", features="probes", target=target)
    refused("the features of a store are of another kind", method="greats", features="stored", store=tmp_path / "x",
            target=target)  # fmt: skip
    refused("uds reads logits, which no store has", method="uds", features="stored", refresh_every=2)
    refused("uds reads logits, not coreset.by_product=loss", method="uds", features="stale", by_product="loss")
    refused("greats reads gradients, not", method="greats", features="stale", by_product="loss", target=target)
