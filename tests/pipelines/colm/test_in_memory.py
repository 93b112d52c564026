"""`pipelines.colm.coreset` on a data set in memory."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import UsageError
from pipelines.colm import coreset


@pytest.fixture(scope="module")
def given(world):
    rows = [json.loads(line) for line in world.pool.read_text().splitlines()]
    return AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model), rows


def test_rows_of_each_large_batch_are_kept_with_what_they_stand_for(given):
    model, tokenizer, rows = given
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    model.train()
    found = coreset(model, tokenizer, rows, keep=8, large_batch=16, settings={"coreset.small": []})
    assert model.training and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert len(found) == 8 * 3 + 6 and len(set(found.indices.tolist())) == len(found)
    assert found.dataset == [rows[i] for i in found.indices]
    assert found.scores["kept"].sum() == len(found) and found.scores["batch"].value_counts().tolist() == [
        16,
        16,
        16,
        12,
    ]
    assert len(found.errors) == 4 and np.mean(found.errors, axis=0)[0] < np.mean(found.errors, axis=0)[1]
    assert "rows kept" in repr(found.report()) and "<iframe" in found._repr_html_()
    again = coreset(model, tokenizer, rows, keep=8, large_batch=16, settings={"coreset.small": []})
    assert again.indices.tolist() == found.indices.tolist()
    weighed = coreset(model, tokenizer, rows, keep=4, method="matching_pursuit", settings={"coreset.small": []})
    assert weighed.weights.std() > 0 and weighed.weights.shape == weighed.indices.shape


def test_what_is_refused(given):
    model, tokenizer, rows = given
    with pytest.raises(UsageError, match="keep"):
        coreset(model, tokenizer, rows, keep=0)
    with pytest.raises(UsageError, match="cannot keep 9 rows of a large batch of 8"):
        coreset(model, tokenizer, rows, keep=9, large_batch=8)
