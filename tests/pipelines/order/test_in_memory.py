"""`pipelines.order` on a data set in memory: it equals the command, and gives the model back as it was."""

import json

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import Order, UsageError, files
from pipelines import order
from pipelines.order import run
from pipelines.settings.load import load_config
from pipelines.settings.order import OrderConfig

QUICK = {"estimators": ["pairwise"], "budget": 50, "retrain": 1, "warmup_steps": 2}


@pytest.fixture(scope="module")
def given(world):
    rows = [json.loads(line) for line in world.pool.read_text().splitlines()]
    return AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model), rows


def test_a_search_is_that_of_the_command(world, given, tmp_path):
    model, tokenizer, rows = given
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model.name": str(world.model), "data.paths": [str(path)], "validation": [str(world.target)]}
    flags |= {"task": "search", "batches": 4, "training.batch_size": 4, "out": tmp_path / "run", **QUICK}
    run.run(load_config(OrderConfig, None, flags))
    before = {name: (value.clone(), id(value)) for name, value in model.named_parameters()}
    state = torch.get_rng_state()
    model.train().requires_grad_(True)
    target = [json.loads(line) for line in world.target.read_text().splitlines()]
    data = datasets.Dataset.from_list(rows)
    found = order(model, tokenizer, data, target, batches=4, batch_size=4, settings=QUICK)
    assert model.training and torch.equal(state, torch.get_rng_state())
    for name, value in model.named_parameters():
        assert torch.equal(before[name][0], value) and value.requires_grad and value.grad is None
    theirs = files.read_json(tmp_path / "run" / "search.json")
    assert found.result["proposed"] == theirs["proposed"] and found.result["rows"] == theirs["rows"]
    kept = Order.load(tmp_path / "run" / "order.npz")
    names = [[str(one) for one in kept.batches[batch]] for batch in kept.sequence]
    assert [[rows[i]["id"] for i in step] for step in found.batches] == names
    assert found.dataset["id"] == [name for step in names for name in step]
    assert len(found) == 4 and found.scores["estimated"].notna().all()
    assert "<iframe" in found._repr_html_() and "batches in the order" in repr(found)


def test_a_plan_in_memory_gives_the_rows_in_the_proposed_order(given):
    model, tokenizer, rows = given
    found = order(
        model, tokenizer, rows, task="plan", batches=4, batch_size=4, settings=QUICK | {"worth": 0, "retrain": 0}
    )
    names = found.scores.sort_values("estimated")["name"]
    best = next(name for name in names if name in ("the plan", "sources mixed"))
    assert found.result["proposed"] == best and repr(found) == f"4 batches in the order {best!r}"
    assert len(found.dataset) == 16 and found.scores["estimated"].notna().all()


def test_what_is_refused(given):
    model, tokenizer, rows = given
    with pytest.raises(UsageError, match="batches= 90|batches 90"):
        order(model, tokenizer, rows, batches=90, settings=QUICK)
    with pytest.raises(UsageError, match="float32"):
        order(model.to(torch.bfloat16), tokenizer, rows, batches=4, batch_size=4, settings=QUICK)
    model.float()
