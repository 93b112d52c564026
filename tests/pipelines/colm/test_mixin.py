"""Coresets in any other Trainer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from datatools import DataError, UsageError
from pipelines.colm import CoresetMixin
from pipelines.settings.train import CoresetConfig
from tests.optim.distributed.processes import run


class CoresetTrainer(CoresetMixin, Trainer):
    """What a user writes."""


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            attention_dropout=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip


def rows_with_sources(n=36):
    from datasets import Dataset

    g = torch.Generator().manual_seed(3)
    rows = []
    for i in range(n):
        ids = torch.randint(3, 60, (6 + i % 5,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:], "kind": "rare" if i % 9 == 0 else f"s{i % 2}"})
    return Dataset.from_list(rows)


def pad(rows):
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key, empty):
        return torch.tensor([row[key] + [empty] * (width - len(row[key])) for row in rows])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != 0).long()}


def strict(rows):
    """A collator that cannot use other columns, as that of a tokenizer cannot use text."""
    assert set(rows[0]) == {"input_ids", "labels"}
    return pad(rows)


def build(folder, cls=CoresetTrainer, data=None, **changes):
    own = {key: changes.pop(key) for key in ("choose", "source_key", "target_dataset") if key in changes}
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "seed": 5,
    }  # fmt: skip
    return cls(model=tiny(), args=TrainingArguments(**values | changes), train_dataset=data or rows_with_sources(),
               eval_dataset=rows_with_sources(5), data_collator=pad, **own)  # fmt: skip


CHOOSE = {"choose": CoresetConfig(keep=3, monitor_every=2, method="facility_location"), "source_key": "kind"}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_accumulation_token_counts_and_evaluation(tmp_path):
    """3 steps an epoch of 2 micro-batches of 3 rows kept of 6; the loss is over the tokens of kept rows."""
    made = build(tmp_path, **CHOOSE)
    counts, steps = [], []
    inner = made.training_step

    def spy(model, inputs, num_items_in_batch=None):
        assert set(inputs) - {"coreset_weights"} == {"input_ids", "labels", "attention_mask"}
        assert len(inputs["input_ids"]) == 3
        counts.append((int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)))
        return inner(model, inputs, num_items_in_batch)

    made.training_step = spy
    made.train()
    steps = [counts[i : i + 2] for i in range(0, len(counts), 2)]
    assert made.state.global_step == 6 and len(counts) == 12
    assert all(total == sum(n for n, _ in step) for step in steps for _, total in step)
    watched = [e for e in made.state.log_history if "match_error" in e]
    assert [e["step"] for e in watched] == [1, 3, 5] and sum(watched[0]["kept_by_source"].values()) == 6
    assert "eval_loss" in made.evaluate()


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_another_trainer_resumes_in_mid_epoch_to_the_same_bits(tmp_path, weighting):
    settings = CHOOSE | {"choose": CHOOSE["choose"].model_copy(update={"loss_weighting": weighting})}
    whole = build(tmp_path / "a", **settings)
    whole.train()
    again = build(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    assert again._choosing._colm.state_dict().keys() > {"exp_avg", "exp_avg_sq"}


def test_a_schedule_keeps_fewer_and_fewer_rows_also_after_a_resume(tmp_path):
    """From 6 of 6 rows of each of two micro-batches down to 2, over six steps."""
    choose = CoresetConfig(keep=2, keep_schedule="linear", method="random_in_source", monitor_every=1)
    whole, again = (build(tmp_path / name, choose=choose, source_key="kind") for name in "ab")
    whole.train()
    kept = [e["kept_rows"] for e in whole.state.log_history if "kept_rows" in e]
    assert kept == [12, 10, 8, 8, 6, 4]
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    cosine = choose.model_copy(update={"keep_schedule": "cosine"})
    assert [cosine.kept_at(t, 5, keep=4, large=12) for t in range(6)] == [12, 11, 8, 5, 4, 4]


def test_a_stream_of_rows_is_chosen_from_without_sources(tmp_path):
    data = rows_with_sources().to_iterable_dataset()
    choose = CoresetConfig(keep=3, features="early", monitor_every=1)
    own = {"data": data, "max_steps": 4, "choose": choose, "source_key": None}
    whole, again = (build(tmp_path / name, **own) for name in "ab")
    whole.train()
    assert [e["kept_rows"] for e in whole.state.log_history if "kept_rows" in e] == [6] * 4
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(UsageError, match=r"a stream of rows, whose sources cannot be counted.*source_key=None"):
        build(tmp_path, **own | {"source_key": "kind"})


def test_another_trainer_without_a_choice_is_untouched(tmp_path):
    found = []
    everything = {"choose": CoresetConfig(keep=6, monitor_every=1), "source_key": "kind"}
    for own in ({"cls": Trainer}, {"choose": None}, everything):
        made = build(tmp_path, save_strategy="no", **own)  # which seeds the generator that dropout draws from
        made.train()
        found.append(weights(made))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("weighting", [None, "example"])
def test_rows_without_a_supervised_token_are_never_chosen(tmp_path, weighting, capsys):
    """As after a cut that leaves nothing of the answer: they train nothing, and the others are reduced as ever."""
    from datasets import Dataset

    rows = rows_with_sources().to_list()
    for i in range(0, 36, 3):
        rows[i]["labels"] = [-100] * len(rows[i]["labels"])
    seen = []
    for keep in (None, 6, 3):
        choose = None if keep is None else CoresetConfig(keep=keep, loss_weighting=weighting, monitor_every=1)
        cls = Trainer if keep is None else CoresetTrainer
        own = {} if keep is None else {"choose": choose, "source_key": "kind"}
        made = build(tmp_path, cls, Dataset.from_list(rows), save_strategy="no", num_train_epochs=1, **own)
        for layer in made.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        kept, inner = [], made.training_step

        def spy(model, inputs, num_items_in_batch=None, kept=kept, inner=inner):
            kept.append((inputs["labels"][:, 1:] != -100).any(1).tolist())
            return inner(model, inputs, num_items_in_batch)

        made.training_step = spy
        made.train()
        seen.append((kept, [e["loss"] for e in made.state.log_history if "loss" in e], weights(made)))
    (plain, losses, at), (whole, same, there), (half, others, _) = seen
    assert sum(map(sum, plain)) == 24 == sum(map(sum, whole)) and all(all(step) for step in whole + half)
    assert [len(step) for step in half] == [max(1, round(sum(step) / 2)) for step in plain]
    if weighting is None:
        torch.testing.assert_close(torch.tensor(same), torch.tensor(losses), rtol=1e-4, atol=0)
        torch.testing.assert_close(there, at, rtol=1e-3, atol=1e-4)
    assert all(loss > 0 for loss in others)
    assert capsys.readouterr().err.count("have no supervised token; such rows are never chosen") == 2, "once a run"


def test_a_step_of_rows_without_a_supervised_token_trains_nothing(tmp_path):
    from datasets import Dataset

    rows = rows_with_sources(12).to_list()
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    made = build(tmp_path, data=Dataset.from_list(rows), save_strategy="no", num_train_epochs=1,
                 choose=CoresetConfig(keep=3, loss_weighting="example"), source_key="kind")  # fmt: skip
    before = weights(made).clone()
    made.train()
    assert torch.equal(weights(made), before)


def test_training_again_reads_the_model_and_the_history_that_it_has_now(tmp_path):
    made = build(tmp_path, save_strategy="no", max_steps=2, **CHOOSE)
    made.train()
    first = made._choosing._colm
    made.train()
    assert made._choosing._colm is first
    made.model = tiny()
    made.model_wrapped, made.optimizer, made.lr_scheduler = made.model, None, None
    made.train()
    assert made._choosing._colm is not first and made._choosing._colm.model is made.model
    saved = build(tmp_path / "saved", **CHOOSE)
    saved.train()
    exact = {k: v.clone() for k, v in saved._choosing._colm.state_dict().items()}
    saved.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-2"))
    assert all(torch.equal(v, exact[k]) for k, v in saved._choosing._colm.state_dict().items()), (
        "from step 2, not from step 6"
    )


def test_lists_of_a_batch_are_reduced_with_its_rows(tmp_path):
    made = build(tmp_path, **CHOOSE)
    inner, seen = made.data_collator.inner, []
    made.data_collator.inner = lambda rows: inner(rows) | {"texts": [str(row["input_ids"]) for row in rows]}
    step = made.training_step

    def spy(model, inputs, num_items_in_batch=None):
        texts, ids = inputs.pop("texts"), inputs["input_ids"]
        seen.append([text == str([t for t in row if t]) for text, row in zip(texts, ids.tolist(), strict=True)])
        return step(model, inputs, num_items_in_batch)

    made.training_step = spy
    made.train()
    assert all(len(each) == 3 and all(each) for each in seen)


def test_a_model_without_a_value_projection_is_refused_before_the_first_step(tmp_path):
    from tests.zoo import build as zoo

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none",
                                  per_device_train_batch_size=6)  # fmt: skip
    with pytest.raises(DataError, match="ReformerModelWithLMHead: .*coresets cannot use this architecture"):
        CoresetTrainer(model=zoo.build("ReformerModelWithLMHead"), args=arguments, data_collator=pad,
                       train_dataset=rows_with_sources(), **CHOOSE)  # fmt: skip


def test_bfloat16(tmp_path):
    made = build(tmp_path, bf16=True, **CHOOSE)
    made.train()
    assert weights(made).isfinite().all() and made.state.global_step == 6
    assert (
        made._choosing._colm.target.product
        and made._choosing._colm.target.replays
        and made._choosing._colm.target.forwards
    )


class OwnLoss(CoresetTrainer):
    """Computes its loss itself, as many trainers do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_weights_of_rows_are_never_left_out_silently(tmp_path):
    """A loss that does not see the weights would train on the kept rows as if they stood for themselves alone."""
    weighted = {"choose": CoresetConfig(keep=3, loss_weighting="example"), "source_key": "kind"}
    with pytest.raises(UsageError, match=r"without label_smoothing_factor=0.3; set it to 0"):
        build(tmp_path, label_smoothing_factor=0.3, **weighted)

    class Focused(TrainingArguments):
        loss_type = "dft"

    with pytest.raises(UsageError, match=r"not loss_type='dft'; use 'nll'"):
        CoresetTrainer(model=tiny(), args=Focused(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
                       train_dataset=rows_with_sources(), data_collator=pad, **weighted)  # fmt: skip
    made = build(tmp_path, OwnLoss, **weighted)
    before = weights(made).clone()
    with pytest.raises(UsageError, match="OwnLoss computes the loss itself, without the weights of the rows"):
        made.train()
    assert torch.equal(weights(made), before)
    build(tmp_path, OwnLoss, **CHOOSE).train()  # without weights, its loss is used as it is


def test_what_another_trainer_refuses(tmp_path):
    with pytest.raises(UsageError, match=r"no column 'dataset', it has \['input_ids', 'labels', 'kind'\]"):
        build(tmp_path, choose=CoresetConfig(keep=3))
    with pytest.raises(UsageError, match="cannot keep 7 rows of a large batch of 6"):
        build(tmp_path, choose=CoresetConfig(keep=7), source_key="kind")
    with pytest.raises(UsageError, match=r"only `datatools train` makes clusters.*source_key="):
        build(tmp_path, choose=CoresetConfig(keep=3, clusters=2), source_key=None)
    with pytest.raises(UsageError, match="large_batch is 9, but per_device_train_batch_size"):
        build(tmp_path, choose=CoresetConfig(keep=3, large_batch=9), source_key="kind")

    class Packing(TrainingArguments):
        packing = True

    with pytest.raises(UsageError, match="packing joins rows into one"):
        CoresetTrainer(model=tiny(), args=Packing(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
                       train_dataset=rows_with_sources(), data_collator=pad, **CHOOSE)  # fmt: skip

    def packed(rows):
        batch = pad(rows)
        n, width = batch["input_ids"].shape
        return batch | {"position_ids": torch.arange(width).remainder(4).expand(n, -1)}

    made = build(tmp_path, **CHOOSE)
    made.data_collator.inner = packed
    before = weights(made).clone()
    with pytest.raises(UsageError, match="the batch contains packed rows"):
        made.train()
    assert torch.equal(weights(made), before)

    def flattened(rows):
        return {key: torch.tensor([[number for row in rows for number in row[key]]]) for key in ("input_ids", "labels")}

    made = build(tmp_path, choose=CHOOSE["choose"], source_key=None)
    made.data_collator.inner = flattened
    with pytest.raises(UsageError, match=r"packed rows \(6 examples in 1\).*a collator that pads"):
        made.train()
    made = build(tmp_path, **CHOOSE)
    made.data_collator.inner = lambda rows: pad(rows) | {"pixel_values": torch.zeros(len(rows), 3)}
    with pytest.raises(UsageError, match="the batch has 'pixel_values'; choices read only text"):
        made.train()
    made = build(tmp_path, **CHOOSE)
    made.data_collator.number.pop("rare")
    with pytest.raises(UsageError, match="a row of the training batches has no 'kind'"):
        made.train()
    saved_without = build(tmp_path / "plain", Trainer)
    saved_without.train()
    with pytest.raises(DataError, match="was saved without a coreset"):
        build(tmp_path / "x", **CHOOSE).train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))


def two_runs(folder):
    """On each rank: the weights after training, twice, and how many of its rows each monitored step kept."""
    found = []
    for name in ("a", "b"):
        made = build(f"{folder}/{name}", ddp_backend="gloo", gradient_accumulation_steps=1, save_strategy="no",
                     num_train_epochs=1, **CHOOSE)  # fmt: skip
        made.train()
        watched = [e for e in made.state.log_history if "match_error" in e]
        found.append((weights(made), [sum(e["kept_by_source"].values()) for e in watched]))
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_agree_and_repeat_themselves(tmp_path):
    (first, kept), *others = [run for rank in run(two_runs, 2, tmp_path, str(tmp_path)) for run in rank]
    assert kept == [3, 3] and all(torch.equal(first, other) for other, _ in others)


def test_trl_s_sft_trainer(tmp_path):
    """TRL's own Trainer, where it is installed: prompt and completion, resumed in mid-epoch; packing refused."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.tiny import save_tiny_model

    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list([
        {"prompt": f"question {i} ", "completion": "answer" * (1 + i % 3), "kind": f"s{i % 2}" if i % 9 else "rare"}
        for i in range(24)
    ])  # fmt: skip

    class CoresetSFTTrainer(CoresetMixin, trl.SFTTrainer):
        pass

    def made(out, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = LlamaForCausalLM.from_pretrained(folder)
        arguments = trl.SFTConfig(output_dir=str(tmp_path / out), per_device_train_batch_size=6, max_steps=4,
                                  save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
                                  logging_steps=1, **changes)  # fmt: skip
        return CoresetSFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **CHOOSE)

    whole = made("a")
    whole.train()
    assert [e["step"] for e in whole.state.log_history if "match_error" in e] == [1, 3]
    again = made("b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(UsageError, match="packing joins rows"):
        made("c", packing=True)
