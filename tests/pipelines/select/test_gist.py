"""`gist`: gradients in the span of the target's, from end to end; and the checkpoints at which gradients are taken."""

import json

import pytest
import torch

from datatools import DataError, GradientFeatures, UsageError, per_sample_grads
from pipelines.models import load as models
from pipelines.models.losses import answer_losses, row_losses
from pipelines.rows.prepare import prepare
from pipelines.select import explain
from pipelines.select import run as select
from pipelines.settings.explain import ExplainConfig
from pipelines.settings.parts import ModelConfig
from pipelines.settings.select import FeaturesConfig, GistConfig
from pipelines.training import checkpoints
from tests.pipelines.select.looking import ids, outcome, scores


@pytest.mark.parametrize(("update", "rank", "how"), [("optimizer", None, "less"), ("plain", 2, "paper")])
def test_scores_are_those_of_a_dense_decomposition(world, tmp_path, update, rank, how):
    """Whole gradients, a singular value decomposition in float64, and cosines within the span."""
    gist, features = GistConfig(update=update, rank=rank), FeaturesConfig(dtype="float32")
    run = select.run(world.select(tmp_path / "run", method="gist", gist=gist, features=features, aggregate=how))
    config = world.select(tmp_path / "unused")
    loaded = models.load(ModelConfig(name=str(world.model)))
    target_of = config.train.model_copy(update={"paths": config.target})
    pool, target = (
        prepare(data, config.model, loaded.tokenizer, cache=tmp_path, label=label)
        for label, data in (("pool", config.train), ("target", target_of))
    )
    last = checkpoints.find([run / "warmup"])[-1]
    with checkpoints.at(last, config.model, loaded.model) as module:
        state = checkpoints.updates(last, checkpoints.trainable(module))
        names = list(state.params)

        def flat(rows, mapped):
            grads = per_sample_grads(row_losses, module, rows, names, method="loop")
            grads = state.per_sample(grads) if mapped else grads
            return torch.cat([grads[name].flatten(1) for name in names], 1).double()

        wanted = flat(target.batch([0, 1, 2]), False)
        rows = flat(pool.batch(list(range(8))), update == "optimizer")
    vh = torch.linalg.svd(wanted, full_matrices=False)[2][:rank]
    ours, theirs = rows @ vh.T, wanted @ vh.T
    if how == "paper":  # the mean gradient of the only subtask
        theirs = theirs.mean(0, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(ours[:, None], theirs[None], dim=2).mean(1)
    torch.testing.assert_close(torch.tensor(scores(run)["_score"][:8]).double(), cosine, rtol=0, atol=1e-3)

    summary = json.loads((run / "summary.json").read_text())
    assert [c["step"] for c in summary["checkpoints"]] == [8]
    store = GradientFeatures.open(next((run / "features").glob("span-*-train-8")))
    assert store.dim == (rank or 3)
    assert explain.run(ExplainConfig(file=run / "selected.jsonl"))["targets"]


def answers(kind):
    """Target rows with two answers each, or with rewards; two rows with rewards are the same answer."""
    if kind == "dpo":
        return [{"prompt": f"say {i}", "chosen": f"yes {i}{i}", "rejected": f"never {i + 5}"} for i in range(3)]
    rewards = {"yes 1": (1.0, 0.5), "never 1": (0.0,), "perhaps 1": (0.5,), "no 1": (-3.0,)}
    return [{"prompt": "say 1", "completion": c, "reward": r} for c, found in rewards.items() for r in found]


@pytest.mark.parametrize(("kind", "rank"), [("dpo", None), ("reward", None), ("reward", 2)])
def test_preferences_and_rewards_span_their_own_gradients(world, tmp_path, kind, rank):
    """Whole gradients of the objective, a singular value decomposition in float64, and weighed cosines."""
    target = tmp_path / "wanted.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in answers(kind)))
    made = {"gist": GistConfig(rank=rank), "features": FeaturesConfig(dtype="float32"), "aggregate": "mean"}
    config = world.select(tmp_path / "run", method="gist", objective=kind, target=[str(target)], **made)
    run = select.run(config)
    loaded = models.load(ModelConfig(name=str(world.model)))

    def rows(paths, **how):
        data = config.train.model_copy(update={"paths": paths, **how})
        return prepare(data, config.model, loaded.tokenizer, cache=tmp_path, label="rows", limits=loaded.limits)

    pool = rows(config.train.paths, preference=None)
    last = checkpoints.find([run / "warmup"])[-1]
    with checkpoints.at(last, config.model, loaded.model) as module:
        state = checkpoints.updates(last, checkpoints.trainable(module))
        names = list(state.params)

        def flat(batch, loss, mapped=False):
            grads = per_sample_grads(loss, module, batch, names, method="loop")
            grads = state.per_sample(grads) if mapped else grads
            return torch.cat([grads[name].flatten(1) for name in names], 1).double()

        ours = flat(pool.batch(list(range(8))), row_losses, mapped=True)
        if kind == "dpo":
            sides = [rows([str(target)], preference=side) for side in ("chosen", "rejected")]
            yes, no = (flat(side.batch([0, 1, 2]), answer_losses) for side in sides)
            theirs, weights = yes - no, torch.ones(3).double()
        else:
            theirs = flat(rows([str(target)], preference=None).batch(list(range(5))), row_losses)
            rewards = torch.tensor([row["reward"] for row in answers(kind)]).double()
            weights = rewards - rewards.mean()
            weights /= weights.abs().mean()
    basis = torch.linalg.svd(theirs * weights[:, None], full_matrices=False)[2]
    basis = basis[: rank or torch.linalg.matrix_rank(theirs * weights[:, None], rtol=1e-5)].T
    cosine = torch.nn.functional.cosine_similarity((ours @ basis)[:, None], (theirs @ basis)[None], dim=2)
    want = (cosine * weights).mean(1)
    torch.testing.assert_close(torch.tensor(scores(run)["_score"][:8]).double(), want, rtol=0, atol=2e-3)
    assert want.abs().max() > 0.02 and len(ids(run)) == 6
    said = json.loads((run / "summary.json").read_text())["formula"]["text"]
    assert ("DPO loss" in said) == (kind == "dpo") and ("A(z')" in said) == (kind == "reward")
    explained = explain.run(ExplainConfig(file=run / "selected.jsonl"))
    assert len(explained["targets"]) == len(answers(kind))


def test_another_objective_has_features_of_its_own(world, tmp_path):
    """Rewards turned round: the same rows span other directions, in the same folder of features."""
    shared = FeaturesConfig(folder=tmp_path / "features")
    warm = None
    for name, sign in (("run", 1), ("turned", -2)):
        target = tmp_path / f"{name}.jsonl"
        rows = [{**row, "reward": sign * row["reward"] ** (1 if sign > 0 else 2)} for row in answers("reward")]
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {} if warm is None else {"checkpoints": [warm]}
        config = world.select(
            tmp_path / name, method="gist", objective="reward", features=shared, target=[str(target)], **given
        )
        warm = select.run(config) / "warmup"
    assert len(list((tmp_path / "features").glob("span-*-train-8"))) == 2


def test_an_interrupted_run_ends_with_the_same_bytes(world, tmp_path, monkeypatch):
    """And another target in the same folder has features of its own, at the same checkpoint."""
    whole = select.run(world.select(tmp_path / "whole", method="gist"))
    inner, left = GradientFeatures.write_unit, [0]

    def write_unit(self, *args, **options):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return inner(self, *args, **options)

    monkeypatch.setattr(GradientFeatures, "write_unit", write_unit)
    for allowed in (0, 1, 2, 99):
        left[0] = allowed
        try:
            run = select.run(world.select(tmp_path / "run", method="gist"))
        except KeyboardInterrupt:
            continue
    assert outcome(run) == outcome(whole)
    shared = FeaturesConfig(folder=run / "features")
    other = world.select(
        tmp_path / "other", method="gist", features=shared, target=[str(world.test)], checkpoints=[run / "warmup"]
    )
    assert len(ids(select.run(other))) == 6
    assert len(list((run / "features").glob("span-*-train-8"))) == 2


def test_checkpoints_that_count(world, tmp_path):
    """`features.checkpoints`: all is the default of less, last of gist; steps are named, and unknown ones refused."""
    for which, steps in (("all", [4, 8]), ("last", [8]), ([4], [4])):
        features = FeaturesConfig(checkpoints=which)
        run = select.run(world.select(tmp_path / f"run{len(steps)}{steps[0]}", features=features))
        summary = json.loads((run / "summary.json").read_text())
        assert [c["step"] for c in summary["checkpoints"]] == steps
        assert sum(c["weight"] for c in summary["checkpoints"]) == pytest.approx(1)
    with pytest.raises(UsageError, match="there is no checkpoint at step 5; there are those at 4, 8"):
        select.run(world.select(tmp_path / "none", features=FeaturesConfig(checkpoints=[5])))


def test_a_target_row_without_a_gradient_is_refused(world, tmp_path, monkeypatch):
    import pipelines.select.gist

    inner = pipelines.select.gist.per_sample_grads
    monkeypatch.setattr(
        pipelines.select.gist,
        "per_sample_grads",
        lambda *args, **options: {name: 0 * grad for name, grad in inner(*args, **options).items()},
    )
    with pytest.raises(DataError, match=r"target row .*:\d has no finite, non-zero gradient \(3 such rows of 3\)"):
        select.run(world.select(tmp_path / "run", method="gist"))
