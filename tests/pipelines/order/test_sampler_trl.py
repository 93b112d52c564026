"""`OrderSampler` in TRL's SFTTrainer, also after a resume."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import UsageError
from datatools.order import Form, OrderSampler
from tests.tiny import save_tiny_model


def test_sfttrainer_trains_in_the_order_also_after_a_resume(tmp_path):
    trl = pytest.importorskip("trl")
    folder = save_tiny_model(tmp_path / "model", layers=1, hidden=16)
    data = Dataset.from_list([{"input_ids": [row + 1] * 4, "labels": [row + 1] * 4} for row in range(8)])
    seen: list[int] = []

    def made(**changes):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.extend((kwargs["input_ids"][:, 0] - 1).tolist()) if model.training else None,
            with_kwargs=True,
        )
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=1, gradient_accumulation_steps=2,
            num_train_epochs=1, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False, **changes,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)

    sampler = OrderSampler(scores=[3, 1, 2, 0, 7, 5, 6, 4], shape="zigzag", form=Form(layers=2))
    with torch.random.fork_rng():
        trainer = made()
        sampler.attach(trainer)
        trainer.train()
        assert seen == list(sampler) == [3, 2, 7, 6, 4, 5, 0, 1]
        seen.clear()
        trainer = made()
        sampler.attach(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert seen == list(sampler)[4:]
        with pytest.raises(UsageError, match="an order of 8 rows for a data set of"):
            sampler.attach(made(packing=True, max_length=16))
