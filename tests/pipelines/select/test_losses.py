"""Hidden states of any layer and pooling, and the losses that the same pass gives: computed once, kept, the same."""

import pytest
import torch

import pipelines.models.states
import pipelines.select.losses
from datatools import DataError, files
from pipelines.models import load as models
from pipelines.models.losses import last_states, row_losses
from pipelines.models.states import states_and_losses
from pipelines.rows.prepare import prepare
from pipelines.select import run as select
from pipelines.settings.parts import ModelConfig
from pipelines.settings.select import FeaturesConfig
from tests.pipelines.select.looking import hashes, scores


@pytest.fixture
def passes(monkeypatch):
    """How many rows' losses are computed, by whom."""
    count = {"rds": 0, "loss": 0}

    def counting(name, inner):
        def function(module, batch):
            count[name] += len(batch["input_ids"])
            return inner(module, batch)

        return function

    monkeypatch.setattr(pipelines.models.states, "row_losses", counting("rds", row_losses))
    monkeypatch.setattr(pipelines.select.losses, "row_losses", counting("loss", row_losses))
    return count


def test_rds_keeps_the_losses_of_its_pass(world, tmp_path, passes):
    """The same bytes as without, and none is computed again by another method, or for a second target."""
    alone = select.run(world.select(tmp_path / "alone", method="loss"))
    assert passes == {"rds": 0, "loss": 60}
    shared = FeaturesConfig(folder=tmp_path / "features")
    select.run(world.select(tmp_path / "rds", method="rds", features=shared))
    assert passes == {"rds": 63, "loss": 60}
    after = select.run(world.select(tmp_path / "loss", method="loss", features=shared))
    assert passes == {"rds": 63, "loss": 60}
    assert scores(after)["_score"] == scores(alone)["_score"]
    assert hashes(tmp_path / "features" / "losses-pool") == hashes(alone / "features" / "losses-pool")


def test_states_of_one_pass_are_those_of_the_decoder_to_the_bit(world, tmp_path):
    config = world.select(tmp_path / "run")
    loaded = models.load(ModelConfig(name=str(world.model)))
    rows = prepare(config.train, config.model, loaded.tokenizer, cache=tmp_path, label="pool")
    batch = rows.batch(list(range(8)))
    with torch.inference_mode():
        states, losses = states_and_losses(loaded.model, batch)
        assert torch.equal(states, last_states(loaded.model, batch["input_ids"]))
        assert torch.equal(losses, row_losses(loaded.model, batch))
        every = loaded.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
        for layer in range(-3, 3):
            assert torch.equal(states_and_losses(loaded.model, batch, layer)[0], every[layer])
        with pytest.raises(DataError, match=r"features.layer=3: .* hidden states 0 .* to 2 .* or -1 to -3"):
            states_and_losses(loaded.model, batch, 3)


@pytest.mark.parametrize(("layer", "pooling"), [(1, "mean"), (-1, "last"), (-2, "answer"), (0, "weighted")])
def test_layers_and_pooling(world, tmp_path, layer, pooling):
    """Row by row, without padding, from what transformers returns."""
    features = FeaturesConfig(layer=layer, pooling=pooling)
    run = select.run(world.select(tmp_path / "run", method="rds", aggregate="max", features=features))
    loaded = models.load(ModelConfig(name=str(world.model)))
    config = world.select(tmp_path / "unused")
    vectors = {}
    for name, data in (("pool", config.train), ("target", config.train.model_copy(update={"paths": config.target}))):
        rows = prepare(data, config.model, loaded.tokenizer, cache=tmp_path, label=name)
        found = []
        for i in range(min(6, len(rows))):
            ids, labels = rows.item(i)
            with torch.inference_mode():
                states = loaded.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
            if pooling == "answer":
                states = states[torch.tensor(labels) != -100]
            weights = torch.arange(1.0, len(states) + 1) if pooling == "weighted" else torch.ones(len(states))
            mean = states[-1] if pooling == "last" else (states * weights[:, None]).sum(0) / weights.sum()
            found.append(torch.nn.functional.normalize(mean, dim=0))
        vectors[name] = torch.stack(found)
    wanted = (vectors["pool"] @ vectors["target"].T).amax(1)
    torch.testing.assert_close(torch.tensor(scores(run)["_score"][:6]), wanted, rtol=0, atol=2e-6)
    assert files.read_json(run / "summary.json")["formula"]["text"].startswith("cosine of the ")
