"""`tov` and `tacs`: scores by the fall of the loss when the model is adapted to the target."""

import json
import re

import pytest
import torch

import pipelines.select.drops
import pipelines.select.losses
from datatools import DataError, GradientFeatures
from datatools.files import sealed
from pipelines.models import load as models
from pipelines.models.lora import add_lora, lora_parameters
from pipelines.models.losses import row_losses
from pipelines.rows.prepare import prepare
from pipelines.runs.seeds import derive_seed
from pipelines.select import explain
from pipelines.select import run as select
from pipelines.select.scorer import scorer
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.parts import LoraConfig, ModelConfig
from pipelines.settings.select import AdaptationConfig, FeaturesConfig
from tests.pipelines.select.looking import ids, outcome, scores
from tests.pipelines.select.test_columns import context_of

ONE = {"depths": [3], "learning_rates": [1e-2], "batch_size": 100}


def settings(**changes):
    return AdaptationConfig(**ONE | changes)


def with_subtasks(world, folder):
    """The target with two subtasks, of two rows and one."""
    rows = [json.loads(line) for line in world.target.read_text().splitlines()]
    path = folder / "subtasks.jsonl"
    path.write_text("".join(json.dumps({**row, "subtask": "ab"[i // 2]}) + "\n" for i, row in enumerate(rows)))
    return [str(path)]


@pytest.mark.parametrize(("method", "length"), [("tov", "mean"), ("tov", "sum"), ("tacs", "capped"), ("tacs", "mean")])
def test_scores_are_what_plain_torch_gives(world, tmp_path, method, length):
    """Three steps of torch's AdamW on the whole target; losses row by row, without padding."""
    run = select.run(world.select(tmp_path / "run", method=method, adaptation=settings(length=length)))
    config = world.select(tmp_path / "unused")
    loaded = models.load(ModelConfig(name=str(world.model)))
    target_of = config.train.model_copy(update={"paths": config.target})
    pool, target = (
        prepare(data, config.model, loaded.tokenizer, cache=tmp_path, label=label)
        for label, data in (("pool", config.train), ("target", target_of))
    )

    def losses(module):
        with torch.no_grad():
            return torch.cat([row_losses(module, pool.batch([i])) for i in range(len(pool))]).double()

    before = losses(loaded.model)
    module = add_lora(loaded.model, LoraConfig(rank=1, alpha=4.0), seed=derive_seed(0, "adaptation")).eval()
    optimizer = torch.optim.AdamW(lora_parameters(module).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack([row_losses(module, target.batch([i]))[0] for i in range(3)]).mean().backward()
        optimizer.step()
    drop = before - losses(module)
    assert drop.abs().max() > 1e-3
    if method == "tacs":
        drop /= before
    lengths = torch.from_numpy(pool.scan.supervised).double()
    cap = float(target.scan.supervised.mean())
    factor = {"mean": torch.ones(60), "sum": lengths, "capped": lengths.clamp_max(cap)}[length]
    torch.testing.assert_close(torch.tensor(scores(run)["_score"]).double(), drop * factor, rtol=1e-3, atol=2e-5)
    assert "after 3 steps" in json.loads((run / "summary.json").read_text())["formula"]["text"]


def test_a_killed_run_ends_with_the_same_bytes(world, tmp_path, monkeypatch):
    """Interrupted after each file that it writes; a second target on the same pool then reuses the base losses."""
    adaptation = AdaptationConfig(depths=[1, 2], learning_rates=[1e-3], folds=2, adapters="fold")
    whole = select.run(world.select(tmp_path / "whole", method="tacs", adaptation=adaptation))
    left = [0]

    def stopping(inner):
        def write(*args, **options):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return inner(*args, **options)

        return write

    for owner, name in ((GradientFeatures, "write_unit"), (sealed, "write_json"), (sealed, "write_tensors")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    attempts = 0
    while True:
        attempts, left[0] = attempts + 1, 5
        try:
            run = select.run(world.select(tmp_path / "run", method="tacs", adaptation=adaptation))
            break
        except KeyboardInterrupt:
            continue
    assert attempts >= 3
    assert outcome(run) == outcome(whole)
    assert len(list((run / "features" / "adapters").glob("walk-*.json"))) == 2
    assert len(list((run / "features" / "adapters").glob("adapter-*.safetensors"))) == 2

    count, inner = [0], row_losses

    def counting(module, batch):
        count[0] += len(batch["input_ids"])
        return inner(module, batch)

    monkeypatch.setattr(pipelines.select.losses, "row_losses", counting)
    left[0] = 10**6
    shared = FeaturesConfig(folder=run / "features")
    other = world.select(
        tmp_path / "other", method="tov", adaptation=settings(), features=shared, target=[str(world.test)]
    )
    select.run(other)
    assert count[0] == 4 + 60  # the other target, and the pool after its adaptation


def test_adapters_are_columns(world, tmp_path):
    """One per subtask or per fold, in any aggregation; the scores of one adapter are its column."""
    target = with_subtasks(world, tmp_path)
    shared = FeaturesConfig(folder=tmp_path / "features")
    for adapters, names, groups in (
        ("target", ["target"], [0]),
        ("subtask", ["a", "b"], [0, 1]),
        ("fold", ["target"], [0, 0, 0]),
    ):
        config = world.select(
            tmp_path / adapters, method="tov", adaptation=settings(adapters=adapters), features=shared, target=target
        )
        with context_of(config) as context:
            columns = scorer("tov").columns(context, None)
            assert scorer("tov").groups(context)[0] == names and scorer("tov").groups(context)[1].tolist() == groups
        assert columns.shape == (60, len(groups)) and len(set(map(tuple, columns.T.tolist()))) == len(groups)
        run = select.run(config.model_copy(update={"out": tmp_path / f"{adapters}-run"}))
        want = columns[:, 0] if adapters == "target" else columns.amax(1) if adapters == "subtask" else columns.mean(1)
        torch.testing.assert_close(torch.tensor(scores(run)["_score"]), want)
        assert {name for name in scores(run) if name.startswith("subtask:")} == {f"subtask:{name}" for name in names}
    for how in ("round_robin", "bids", "paper", "max"):
        again = config.model_copy(update={"out": tmp_path / how, "aggregate": how})
        assert len(ids(select.run(again))) == 6


def test_what_cannot_work_is_refused_with_its_number(world, tmp_path, monkeypatch):
    one = tmp_path / "one.jsonl"
    one.write_text(world.target.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"the target has 1 distinct row, and folds need at least 2"):
        select.run(world.select(tmp_path / "a", method="tacs", target=[str(one)]))
    assert (
        len(ids(select.run(world.select(tmp_path / "b", method="tacs", target=[str(one)], adaptation=settings())))) == 6
    )
    wrong = settings(lora=LoraConfig(rank=1, targets=["no_such_layer"]))
    with pytest.raises(DataError, match=r"^adaptation.lora.targets no_such_layer: no layer of this model"):
        select.run(world.select(tmp_path / "c", method="tov", adaptation=wrong))
    with pytest.raises(DataError, match=r"not finite at step \d+ with learning rate 100; lower"):
        hot = settings(learning_rates=[100.0], depths=[2000], lora=LoraConfig(rank=1, alpha=1e6))
        select.run(world.select(tmp_path / "d", method="tov", adaptation=hot))


def test_rows_without_a_usable_loss_have_a_status_and_no_score(world, tmp_path, monkeypatch):
    inner = pipelines.select.drops.losses

    def losses(context, kind, rows, chosen, **options):
        found = inner(context, kind, rows, chosen, **options)
        if kind == "pool" and not options:
            found[4], found[7] = 0.0, float("nan")
        return found

    monkeypatch.setattr(pipelines.select.drops, "losses", losses)
    run = select.run(world.select(tmp_path / "run", method="tacs", adaptation=settings(), budget="58"))
    table = scores(run)
    assert (table["_status"][4], table["_status"][7]) == ("empty", "nonfinite")
    assert table["_score"][4] is None and table["_score"][7] is None and len(ids(run)) == 58

    def broken(context, kind, rows, chosen, **options):
        found = inner(context, kind, rows, chosen, **options)
        return found * float("nan") if kind == "target" else found

    monkeypatch.setattr(pipelines.select.drops, "losses", broken)
    with pytest.raises(DataError, match=r"target row .*:1 has a loss that is not finite \(3 such rows of 3\)"):
        select.run(world.select(tmp_path / "dead", method="tov", adaptation=settings()))


def test_explain_shows_which_tokens_gained(world, tmp_path, capsys):
    run = select.run(world.select(tmp_path / "run", method="tov", adaptation=settings()))
    found = explain.run(ExplainConfig(file=run / "selected.jsonl"))
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens of the answer that gain most" in said
    drop = sum(one["before"] - one["after"] for one in found["tokens"]) / len(found["tokens"])
    assert drop == pytest.approx(found["score"], abs=1e-4)
    assert "".join(one["token"] for one in found["tokens"]).startswith(found["answer"][:5])


def test_a_dry_run_says_what_it_costs(world, tmp_path, capsys):
    tokens = {}
    for method in ("loss", "tacs"):
        select.run(world.select(tmp_path / "run", method=method, dry_run=True))
        found = re.search(r"left: ([\d,]+) tokens through the model, about .* of memory, ", capsys.readouterr().err)
        assert found, method
        tokens[method] = int(found[1].replace(",", ""))
    assert tokens["tacs"] > 2 * tokens["loss"], "the pool before and after, and the adaptation"
    assert not (tmp_path / "run").exists()
