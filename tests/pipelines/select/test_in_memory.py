"""`pipelines.select` on what is in memory: it equals the command, and gives everything back as it was."""

import copy
import json
import os
import random

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import DataError, UsageError
from pipelines import select
from pipelines.models import borrowed
from pipelines.models.adapters import load_adapter
from pipelines.models.lora import add_lora
from pipelines.select import gradients as less_method
from pipelines.select import in_memory, run
from pipelines.settings.load import load_config
from pipelines.settings.parts import LoraConfig
from pipelines.settings.select import SelectConfig

SMALL = {
    "warmup.minimum_rows": 16,
    "warmup.epochs": 2,
    "warmup.batch_size": 4,
    "projector.dim": 256,
    "lora.rank": 4,
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def model(world):
    return AutoModelForCausalLM.from_pretrained(world.model)


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.model)


@pytest.fixture(scope="module")
def pool(world):
    return rows_of(world.pool)


@pytest.fixture(scope="module")
def target(world):
    return rows_of(world.target)


def state_of(model):
    """All that must be as it was: values and identity."""
    return {
        "weights": {name: t.clone() for name, t in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad, id(p.grad)) for name, p in model.named_parameters()},
        "modules": {name: (id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "configuration": (model.config.to_dict(), model.generation_config.to_dict()),
    }


def same(before, after):
    weights, others = before.pop("weights"), after.pop("weights")
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
    assert before == after


def process():
    return (
        random.getstate(),
        tuple(np.random.get_state()[1]),
        torch.get_rng_state().tolist(),
        dict(os.environ),
        torch.get_num_threads(),
        dict(PartialState._shared_state),
        dict(AcceleratorState._shared_state),
    )


# ---------------------------------------------------------------------------------------------- equal to the command's


@pytest.mark.parametrize("method", ["less", "rds", "tfidf", "loss", "random", "random-length"])
def test_results_are_those_of_the_command(world, model, tokenizer, pool, target, method, tmp_path):
    flags = {"method": method, "budget": "10%", "target": [str(world.target)], "out": tmp_path / "run", **SMALL}
    config = load_config(
        SelectConfig, None, {"model.name": str(world.model), "train.paths": [str(world.pool)], **flags}
    )
    run.run(config)
    theirs = pq.read_table(tmp_path / "run" / "scores.parquet").to_pandas()
    found = select(model, tokenizer, pool, target, budget="10%", method=method, settings=SMALL)
    assert found.dataset == rows_of(tmp_path / "run" / "selected.jsonl")
    np.testing.assert_array_equal(found.scores["score"], theirs["_score"])
    assert found.scores["id"].tolist() == theirs["_id"].tolist()
    assert found.scores["selected"].sum() == len(found) == 6
    assert found.scores.index.tolist() == list(range(60))
    assert found.folder is None


def test_every_type_of_data_gives_the_same_rows_in_its_own_type(model, tokenizer, pool, target):
    as_list = select(model, tokenizer, pool, target, budget=5, method="rds")
    frame = pd.DataFrame(pool, index=[f"row {i}" for i in range(len(pool))])
    as_frame = select(model, tokenizer, frame, pd.DataFrame(target), budget=5, method="rds")
    data = datasets.Dataset.from_list(pool)
    as_data = select(model, tokenizer, data, datasets.Dataset.from_list(target), budget=5, method="rds")
    as_tuple = select(model, tokenizer, tuple(pool), target, budget=5, method="rds")
    assert as_list.indices.tolist() == as_frame.indices.tolist() == as_data.indices.tolist()
    assert isinstance(as_list.dataset, list) and as_list.dataset == [pool[i] for i in as_list.indices]
    assert isinstance(as_tuple.dataset, tuple) and list(as_tuple.dataset) == as_list.dataset
    assert isinstance(as_frame.dataset, pd.DataFrame)
    assert as_frame.dataset.index.tolist() == [f"row {i}" for i in as_list.indices]
    assert as_frame.scores.index.equals(frame.index)
    assert isinstance(as_data.dataset, datasets.Dataset)
    assert as_data.dataset["id"] == [row["id"] for row in as_list.dataset]


def test_budgets_and_several_targets(model, tokenizer, pool, target):
    found = select(
        model, tokenizer, pool, {"first": target[:1], "second": target[1:]}, budget=0.1, method="rds", selector="top_k"
    )
    assert len(found) == 6
    with pytest.raises(UsageError, match="cannot be the name"):
        select(model, tokenizer, pool, {"a/b": target}, method="rds")


def test_rows_that_cannot_be_used_keep_their_place(model, tokenizer, pool, target):
    spoilt = [*pool[:5], {"what": 1}, *pool[5:]]
    with pytest.raises(DataError, match=r"memory:pool:6.*settings\[\"train.on_bad_row\"\] skip"):
        select(model, tokenizer, spoilt, target, budget=5, method="rds")
    found = select(model, tokenizer, spoilt, target, budget=5, method="rds", settings={"train.on_bad_row": "skip"})
    assert found.scores["status"].tolist() == ["ok"] * 5 + ["unknown_format"] + ["ok"] * 55
    assert np.isnan(found.scores["score"][5]) and not found.scores["selected"][5]
    clean = select(model, tokenizer, pool, target, budget=5, method="rds")
    assert found.dataset == clean.dataset


def test_the_report_is_shown_and_saved(model, tokenizer, pool, target, tmp_path):
    found = select(model, tokenizer, pool, target, budget=5, method="tfidf")
    report = found.report()
    assert "<iframe" in report._repr_html_() and "<script" not in report.html
    assert found._repr_html_() == report._repr_html_()
    assert "5 of 60 rows selected by tfidf" in repr(report)
    assert "pipelines.select(model, tokenizer" in report.html
    assert report.save(tmp_path / "page.html").read_text() == report.html


def test_without_a_model_for_methods_that_use_none(tokenizer, pool, target):
    assert len(select(None, tokenizer, pool, target, budget=4, method="tfidf")) == 4
    with pytest.raises(UsageError, match="model is None, and method rds needs one"):
        select(None, tokenizer, pool, target, method="rds")


# ------------------------------------------------------------------------------------------------- nothing is left over


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_afterwards_what_it_was(model, tokenizer, pool, target, training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.train(training)
    model.config.use_cache = True
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.ones_like(parameter) if number % 3 == 0 else None
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.gradient_checkpointing_enable()
    text, template = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    rows = copy.deepcopy(pool)
    before, around = state_of(model), process()
    grads = [p.grad for p in model.parameters()]
    select(model, tokenizer, pool, target, budget=5, method="less", settings=SMALL)
    same(before, state_of(model))
    assert all(old is p.grad for old, p in zip(grads, model.parameters(), strict=True))
    assert process() == around
    assert tokenizer.backend_tokenizer.to_str() == text and tokenizer.chat_template == template
    assert pool == rows
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["the features", "the warm-up"])
def test_everything_is_afterwards_what_it_was_when_it_fails(model, tokenizer, pool, target, where, monkeypatch):
    def fail(*args, **options):
        assert any("lora_" in name for name, _ in model.named_parameters())  # in the middle of it
        raise RuntimeError("in the middle")

    if where == "the features":
        monkeypatch.setattr(less_method, "extract", fail)
    else:
        monkeypatch.setattr("pipelines.training.fit.DataTrainer.train", fail)
    model.train()
    before, around = state_of(model), process()
    with pytest.raises(RuntimeError, match="in the middle"):
        select(model, tokenizer, pool, target, budget=5, method="less", settings=SMALL)
    same(before, state_of(model))
    assert process() == around


def adapted(model, seed=0):
    """A model of peft whose adapter does something."""
    wrapped = add_lora(model, LoraConfig(rank=2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return wrapped


@pytest.mark.parametrize("method", ["less", "rds"])
def test_a_model_with_an_adapter_gives_what_the_command_gives_with_it(
    world, model, tokenizer, pool, target, method, tmp_path
):
    wrapped = adapted(model).train()
    wrapped.save_pretrained(tmp_path / "adapter")
    flags = {"method": method, "budget": 6, "target": [str(world.target)], "out": tmp_path / "run", **SMALL}
    flags |= {"model.name": str(world.model), "model.adapter": tmp_path / "adapter"}
    run.run(load_config(SelectConfig, None, {"train.paths": [str(world.pool)], **flags}))
    before = state_of(wrapped)
    found = select(wrapped, tokenizer, pool, target, budget=6, method=method, settings=SMALL)
    same(before, state_of(wrapped))
    assert found.dataset == rows_of(tmp_path / "run" / "selected.jsonl")
    plain = select(load_adapter_free(world), tokenizer, pool, target, budget=6, method=method, settings=SMALL)
    assert not np.array_equal(plain.scores["score"], found.scores["score"])


def load_adapter_free(world):
    return AutoModelForCausalLM.from_pretrained(world.model)


def test_the_active_adapter_of_several_is_used(world, model, tokenizer, pool, target, tmp_path):
    adapted(model, seed=1).save_pretrained(tmp_path / "one")
    other = load_adapter_free(world)
    adapted(other, seed=2).save_pretrained(tmp_path / "two")
    both = load_adapter(load_adapter_free(world), tmp_path / "one")
    both.load_adapter(str(tmp_path / "two"), adapter_name="two")
    first = select(both, tokenizer, pool, target, budget=6, method="rds").scores["score"]
    both.set_adapter("two")
    second = select(both, tokenizer, pool, target, budget=6, method="rds").scores["score"]
    alone = load_adapter(load_adapter_free(world), tmp_path / "two")
    np.testing.assert_array_equal(
        second, select(alone, tokenizer, pool, target, budget=6, method="rds").scores["score"]
    )
    assert not np.array_equal(first, second)
    both.base_model.set_adapter(["default", "two"])
    with pytest.raises(UsageError, match="2 active adapters"):
        select(both, tokenizer, pool, target, budget=6, method="rds")


def test_out_keeps_the_run_which_then_goes_on_and_is_explained(world, model, tokenizer, pool, target, tmp_path, capsys):
    from pipelines.cli import app

    out = tmp_path / "run"
    first = select(model, tokenizer, pool, target, budget=5, method="rds", out=out)
    assert first.folder == out and (out / "report.html").is_file()
    assert [r["id"] for r in rows_of(out / "selected.jsonl")] == [r["id"] for r in first.dataset]
    again = select(model, tokenizer, pool, target, budget=5, method="rds", out=out)
    assert again.dataset == first.dataset
    assert app.main(["explain", f"{out}/selected.jsonl:1"]) in (0, None)
    assert "chosen by --method rds" in capsys.readouterr().out
    with pytest.raises(UsageError, match="other settings: budget was 5, is 6"):
        select(model, tokenizer, pool, target, budget=6, method="rds", out=out)
    with pytest.raises(DataError, match="model"):
        select(load_other(world), tokenizer, pool, target, budget=5, method="rds", out=out)
    select(model, tokenizer, pool, target, budget=6, method="rds", out=out, overwrite=True)
    assert (tmp_path / "run.old-1").is_dir()


def load_other(world):
    other = load_adapter_free(world)
    with torch.no_grad():
        other.model.norm.weight.add_(0.5)
    return other


# ------------------------------------------------------------------------------------------------------ what is refused


def test_data_that_cannot_be_selected_from(model, tokenizer, pool, target):
    data = datasets.Dataset.from_list(pool)
    refused = [
        ([], "dataset has no row"),
        (data.select([]), "dataset has no row"),
        (data.to_iterable_dataset(), r"datasets.IterableDataset.*list\(dataset.take"),
        (iter(pool), "in a stream"),
        (datasets.DatasetDict({"train": data}), r"dataset\['train'\]"),
        ("pool.jsonl", "datatools select"),
        (7, "expected a datasets.Dataset"),
        ([1, 2], "row 0 is a int"),
    ]
    for given, text in refused:
        with pytest.raises(UsageError, match=text):
            select(model, tokenizer, given, target, method="rds")
    with pytest.raises(UsageError, match="target has no row"):
        select(model, tokenizer, pool, [], method="rds")
    with pytest.raises(DataError, match="columns prompt=YOURS"):
        select(model, tokenizer, [{"frage": "a", "antwort": "b"}], target, method="rds")
    both = pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"])
    with pytest.raises(UsageError, match="two columns"):
        select(model, tokenizer, both, target, method="rds")


def test_missing_values_of_a_data_frame_are_null(model, tokenizer):
    frame = pd.DataFrame(
        {"prompt": ["a b", "c d"], "completion": ["x", "y"], "id": [None, "own"], "score": [1.0, None]}
    )
    found = select(model, tokenizer, frame, frame, budget=1, method="tfidf")
    assert found.scores["id"].tolist() == ["pool:1", "own"]


def test_models_and_tokenizers_that_cannot_be_used(world, model, tokenizer, pool, target):
    with pytest.raises(UsageError, match=r"model is a builtins.str.*command line"):
        select("a name", tokenizer, pool, target)
    with pytest.raises(UsageError, match="tokenizer is None"):
        select(model, None, pool, target)
    with pytest.raises(UsageError, match="not loaded"):
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model.config)
        select(empty, tokenizer, pool, target)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="chat=FILE, or 'tulu'"):
        select(model, bare, pool, target, method="rds")
    assert len(select(model, bare, pool, target, method="rds", chat="tulu", budget=3)) == 3
    with pytest.raises(DataError, match="not causal|cannot be run"):
        select(Bidirectional(model), tokenizer, pool, target, method="rds")


class Bidirectional(nn.Module):
    """A model whose logits see the whole row."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.device = inner, inner.config, inner.device

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, **options):
        found = self.inner(input_ids=input_ids, **options)
        found.logits = found.logits + found.logits.mean(1, keepdim=True)
        return found


def test_settings_by_name(model, tokenizer, pool, target):
    with pytest.raises(UsageError, match="argument budget"):
        select(model, tokenizer, pool, target, settings={"budget": "5%"})
    with pytest.raises(UsageError, match="'rnak'; did you mean 'rank'"):
        select(model, tokenizer, pool, target, settings={"lora.rnak": 4})
    with pytest.raises(UsageError, match="there is no|method"):
        select(model, tokenizer, pool, target, method="lesss")
    nested = select(model, tokenizer, pool, target, budget=3, method="rds", settings={"features": {"token_budget": 64}})
    assert len(nested) == 3


def test_the_module_is_still_the_room():
    assert select.run is run and select.in_memory is in_memory
    assert callable(select.run)


def test_a_lent_model_is_found_inside_only(model, tokenizer):
    with borrowed.lent(model, tokenizer, "mine"):
        assert borrowed.find("mine").model is model and borrowed.find("other") is None
    assert borrowed.find("mine") is None
