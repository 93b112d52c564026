"""Selections from checkpoints of the user's own run."""

import json
import math
import shutil

import pytest
import torch

from datatools import DataError, UsageError
from pipelines.models import load as models
from pipelines.select import run as select
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training import checkpoints, train
from tests.pipelines.select.looking import scores


def test_checkpoints_of_datatools_train(world, tmp_path):
    """The folder of the training run is enough; weights are the mean learning rates between its checkpoints."""
    run = train.run(
        TrainConfig(
            model=ModelConfig(name=str(world.model)),
            data=DataConfig(paths=[str(world.test)]),
            out=tmp_path / "train",
            lora=LoraConfig(rank=4),
            training=TrainingConfig(epochs=3, batch_size=2, learning_rate=1e-3, warmup_ratio=0.5),
        )
    )
    chosen = select.run(world.select(tmp_path / "select", checkpoints=[run]))
    stops = json.loads((chosen / "summary.json").read_text())["checkpoints"]
    assert [s["step"] for s in stops] == [2, 4, 6]
    # linear over T + 1 = 7 with 3 steps up: k / 3 for k <= 3, then (7 - k) / 4
    rates = [1e-3 * (k / 3 if k < 3 else (7 - k) / 4) for k in range(1, 7)]
    assert [s["mean_lr"] for s in stops] == pytest.approx([sum(rates[i : i + 2]) / 2 for i in (0, 2, 4)])
    total = sum(s["mean_lr"] for s in stops)
    assert [s["weight"] for s in stops] == pytest.approx([s["mean_lr"] / total for s in stops])
    assert not (chosen / "warmup").exists()
    one = select.run(world.select(tmp_path / "one", checkpoints=[run / "checkpoints" / "checkpoint-4"]))
    assert [s["step"] for s in json.loads((one / "summary.json").read_text())["checkpoints"]] == [4]


@pytest.mark.parametrize("rank", [4, None])
def test_checkpoints_of_a_trainer_run(world, tmp_path, rank):
    """A plain transformers Trainer, with peft and with all weights: its optimizer.pt has no names."""
    folder = plain_trainer(world, tmp_path / "trainer", rank)
    if rank is None:
        assert not (folder / "checkpoint-2" / "tokenizer.json").exists()
    run = select.run(world.select(tmp_path / "select", checkpoints=[folder]))
    summary = json.loads((run / "summary.json").read_text())
    # Trainer's linear schedule without warm-up: 1, 3/4, 1/2, 1/4 of the peak
    assert [s["mean_lr"] for s in summary["checkpoints"]] == pytest.approx([1e-3 * 0.875, 1e-3 * 0.375])
    assert all(value is not None and math.isfinite(value) for value in scores(run)["_score"])
    assert summary["model"]["seen_share"] == 1.0 if rank else 0.5 < summary["model"]["seen_share"] < 1
    if rank is None:
        assert any("embed_tokens" in name for name in summary["model"]["unseen"])


def plain_trainer(world, folder, rank):
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    loaded = models.load(ModelConfig(name=str(world.model)))
    model = loaded.model.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if rank is not None:
            model = get_peft_model(model, PeftLora(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        ids = torch.arange(40).reshape(8, 5)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    return folder


def test_checkpoints_that_cannot_be_used_are_refused(world, tmp_path):
    folder = plain_trainer(world, tmp_path / "trainer", 4)
    stop = folder / "checkpoint-4"
    state = json.loads((stop / "trainer_state.json").read_text())
    cases = {
        "nothing": (lambda: None, UsageError, "no such folder"),
        "no state": (lambda: (stop / "optimizer.pt").unlink(), DataError, "contains no optimizer.pt"),
        "no log": (
            lambda: (stop / "trainer_state.json").write_text(json.dumps({**state, "log_history": []})),
            DataError,
            "logs no learning rate for steps 3 to 4",
        ),
        "no state.json": (lambda: (stop / "trainer_state.json").unlink(), DataError, "trainer_state.json is missing"),
    }
    saved = shutil.copytree(stop, tmp_path / "saved")
    for name, (damage, error, text) in cases.items():
        shutil.rmtree(stop)
        shutil.copytree(saved, stop)
        damage()
        paths = [tmp_path / "missing"] if name == "nothing" else [folder]
        with pytest.raises(error, match=text):
            checkpoints.find(paths)


def test_a_half_saved_or_damaged_checkpoint_of_ours_is_not_used(world, tmp_path):
    """After a kill inside a save the folder of our own run can be given all the same; damage is refused by name."""
    run = train.run(
        TrainConfig(
            model=ModelConfig(name=str(world.model)),
            data=DataConfig(paths=[str(world.test)]),
            out=tmp_path / "train",
            lora=LoraConfig(rank=4),
            training=TrainingConfig(epochs=2, batch_size=2),
        )
    )
    last = run / "checkpoints" / "checkpoint-4"
    (last / "complete.json").rename(tmp_path / "complete.json")
    (last / "optimizer.pt").write_bytes(b"half")
    assert [c.step for c in checkpoints.find([run])] == [2]
    (tmp_path / "complete.json").rename(last / "complete.json")
    with pytest.raises(DataError, match="checkpoint-4: a file differs from complete.json"):
        checkpoints.find([run])
