"""What scores are: losses and hidden states as plain torch gives them, and numbers that are not finite."""

import json

import pytest
import torch

from pipelines.models import load as models
from pipelines.models import losses
from pipelines.models.losses import row_losses
from pipelines.select import run as select
from pipelines.settings.parts import ModelConfig
from pipelines.settings.select import FeaturesConfig
from tests.pipelines.select.looking import ids, rows_in, scores


def test_losses_are_the_model_s(world, tmp_path):
    """--method loss: the mean over supervised tokens that plain torch gives, row by row."""
    run = select.run(world.select(tmp_path / "run", method="loss"))
    loaded = models.load(ModelConfig(name=str(world.model)))
    for row, score in list(zip(rows_in(world.pool), scores(run)["_score"], strict=True))[:5]:
        text = loaded.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        encoded = loaded.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        start = text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
        end = text.rindex("<|im_end|>") + len("<|im_end|>")
        tokens = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                loaded.model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
            )
        inside = torch.tensor([start <= a and b <= end for a, b in encoded["offset_mapping"][1:]])
        assert score == pytest.approx(float(losses[inside].mean()), abs=1e-5)


def test_hidden_states_are_averaged_by_position(world, tmp_path):
    """--method rds: weights 1, 2, ..., s over a row's own positions, whatever padding its batch has."""
    run = select.run(world.select(tmp_path / "run", method="rds", aggregate="max"))
    loaded = models.load(ModelConfig(name=str(world.model)))

    def vector(row):
        text = loaded.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = loaded.model(tokens, output_hidden_states=True).hidden_states[-1][0]
        weight = torch.arange(1.0, len(hidden) + 1)
        return torch.nn.functional.normalize((hidden * weight[:, None]).sum(0) / weight.sum(), dim=0)

    target = torch.stack([vector(row) for row in rows_in(world.target)])
    for row, score in list(zip(rows_in(world.pool), scores(run)["_score"], strict=True))[:5]:
        assert score == pytest.approx(float((target @ vector(row)).max()), abs=1e-5)


def test_hidden_states_that_are_not_finite_have_no_score(world, tmp_path, monkeypatch):
    """RDS+ too: such a row has a status instead of a score, and is not chosen when the budget asks for every row."""
    inner = models.load

    def load(*args, **kwargs):
        loaded = inner(*args, **kwargs)
        if loaded.model is not None:

            def spoil(_, inputs, output):
                if len(output.last_hidden_state) > 3:  # a batch of the pool; the target has three rows
                    output.last_hidden_state[0] = float("inf")
                return output

            loaded.model.base_model.register_forward_hook(spoil)
        return loaded

    monkeypatch.setattr(models, "load", load)
    run = select.run(world.select(tmp_path / "run", method="rds", budget="100%"))
    table = scores(run)
    bad = [i for i, status in enumerate(table["_status"]) if status == "nonfinite"]
    assert bad and len(ids(run)) == len(table["_id"]) - len(bad)
    for i in bad:
        assert table["_score"][i] is None and not table["_selected"][i]


@pytest.mark.parametrize("how", ["paper", "mean", "max", "round_robin", "bids"])
def test_every_aggregation_selects(first, world, tmp_path, how):
    """Another aggregation reads the same features: nothing is computed again in a shared folder."""
    run = select.run(world.select(tmp_path / "run", aggregate=how, features=FeaturesConfig(folder=first / "features")))
    assert len(ids(run)) == 6
    if how in ("mean", "max"):  # one subtask of three rows
        wanted = "subtask:target" if how == "mean" else "_nearest_similarity"
        torch.testing.assert_close(torch.tensor(scores(run)["_score"]), torch.tensor(scores(first)[wanted]))


def test_non_finite_rows_are_marked_and_never_chosen(world, first, tmp_path, monkeypatch):
    """A row whose loss is not a number has a status instead of a score; the others keep theirs to the bit."""
    table = scores(first)
    key = table["_key"][table["_id"].index(ids(first)[0])]  # the very best row is the one that breaks
    inner = row_losses
    index = table["_key"].index(key)

    def broken(model, batch):
        values, n = inner(model, batch), len(encoded)
        if model.training or batch["input_ids"].shape[1] < n:
            return values
        same = (batch["input_ids"][:, :n] == torch.tensor(encoded)).all(1)
        values = values.clone()
        values[same] = values[same] * float("nan")  # not torch.where: its gradient would be 0 nan = nan everywhere
        return values

    from pipelines.rows.encode import Encoder
    from pipelines.rows.read import read_pool

    config = world.select(tmp_path / "run")
    tokenizer = models.load(config.model, tokenizer_only=True).tokenizer
    pool, _ = read_pool([world.pool], cache=tmp_path)
    encoded = Encoder(tokenizer, max_length=1024)(pool[index]).input_ids
    monkeypatch.setattr(losses, "row_losses", broken)
    run = select.run(config)
    after = scores(run)
    assert after["_status"][index] == "nonfinite" and after["_score"][index] is None and not after["_selected"][index]
    assert after["_rank"][index] is None and after["_nearest"][index] is None
    others = [i for i in range(60) if i != index]
    assert [after["_score"][i] for i in others] == [table["_score"][i] for i in others]
    assert ids(run)[:5] == ids(first)[1:]
    assert (
        "1 rows have status nonfinite and were not scored" in json.loads((run / "summary.json").read_text())["warnings"]
    )
