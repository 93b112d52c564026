"""Targets that are preferences or rewards, against gradients by autograd."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from datatools import PROJECTORS, DataError, GradientFeatures, UsageError, extract_preferences, files, less_scores
from optim import SGDRule, UpdateMap, create
from pipelines import select
from pipelines.models.losses import answer_losses, dense_answer_losses
from pipelines.select import objectives
from pipelines.settings.select import SelectConfig

SMALL = {
    "warmup.minimum_rows": 8,
    "warmup.epochs": 1,
    "warmup.batch_size": 4,
    "lora.rank": 2,
    "projector.dim": 512,
}
BETA = 0.3


@pytest.fixture(scope="module")
def model(world):
    return AutoModelForCausalLM.from_pretrained(world.model).eval()


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.model)


def batch_of(seed, rows=3, width=9):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (rows, width), generator=draw)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row] = -100  # a prompt
        labels[row, width - row :] = -100  # padding
    return {"input_ids": ids, "labels": labels}


def log_likelihood(model, batch, row):
    """Of one answer, from plain logits: nothing of the code under test."""
    ids, labels = batch["input_ids"][row : row + 1], batch["labels"][row, 1:]
    logs = functional.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    where = (labels != -100).nonzero()[:, 0]
    return logs[where, labels[where]].sum()


def test_summed_losses_are_negative_log_likelihoods(model):
    batch = batch_of(0)
    for losses in (answer_losses, dense_answer_losses):
        with torch.no_grad():
            found = losses(model, batch)
            want = torch.stack([-log_likelihood(model, batch, row) for row in range(3)])
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moved", [0.0, 0.02])
def test_features_are_gradients_of_the_dpo_loss(model, tmp_path, moved):
    """At the reference model, and away from it, where the factor of each pair is another."""
    reference, policy = copy.deepcopy(model), copy.deepcopy(model)
    names = [name for name, _ in policy.named_parameters() if "q_proj" in name or "o_proj" in name]
    draw = torch.Generator().manual_seed(1)
    params = dict(policy.named_parameters())
    for name in names:
        params[name].data += moved * torch.randn(params[name].shape, generator=draw)
    chosen, rejected = batch_of(2), batch_of(3)
    optimizer = create("sgd", [(name, params[name]) for name in names], lr=0.1)
    updates = UpdateMap.of(optimizer, rules=SGDRule())
    projector = PROJECTORS["identity"].of({name: params[name].shape for name in names}, dim=1, seed=0)
    keys = [files.digest(b"%d" % i) for i in range(3)]
    store = GradientFeatures.create_or_open(
        tmp_path / "s", meta={"a": 1}, dim=projector.dim, dtype="float32", keys=keys
    )
    place = {key: i for i, key in enumerate(keys)}

    def of(batch):
        return lambda wanted: {name: value[[place[key] for key in wanted]] for name, value in batch.items()}

    extract_preferences(
        store, policy, answer_losses, of(chosen), of(rejected), dict.fromkeys(keys, 9), updates, projector
    )
    features = store.take(keys)
    factors = []
    for row in range(3):
        margins = [log_likelihood(one, chosen, row) - log_likelihood(one, rejected, row) for one in (policy, reference)]
        loss = -functional.logsigmoid(BETA * (margins[0] - margins[1].detach()))
        factors.append(float(torch.sigmoid(-BETA * (margins[0] - margins[1])).detach()))
        grads = torch.autograd.grad(loss, [params[name] for name in names])
        held = {name: grad[None] for name, grad in zip(names, grads, strict=True)}
        want = projector.project(held)[0]
        torch.testing.assert_close(features[row], want / want.norm(), rtol=1e-3, atol=1e-5)
    assert (max(factors) - min(factors) > 1e-3) == bool(moved)


def test_advantages_weigh_similarities_and_averaged_gradients(tmp_path):
    draw = torch.Generator().manual_seed(0)
    pool, target = torch.randn(5, 4, generator=draw), torch.randn(3, 4, generator=draw)
    stores = []
    for name, rows in (("pool", pool), ("target", target)):
        keys = [files.digest(f"{name}{i}".encode()) for i in range(len(rows))]
        store = GradientFeatures.create_or_open(tmp_path / name, meta={}, dim=4, dtype="float32", keys=keys)
        for unit in store.missing_units():
            store.write_unit(unit, rows[[keys.index(key) for key in store.unit_keys(unit)]])
        stores.append((store, keys))
    (train, keys), (wanted, target_keys) = stores
    counts, groups = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0, 0, 1])
    given = {"keys": keys, "target_keys": target_keys, "advantages": counts}
    unit = functional.normalize(pool, dim=1)
    similarity = unit @ functional.normalize(target, dim=1).T * counts
    found = less_scores([train], [wanted], [1.0], groups, how="mean", **given)
    torch.testing.assert_close(found.similarity, similarity, rtol=1e-5, atol=1e-6)
    want = (similarity[:, :2].mean(1) + similarity[:, 2]) / 2  # the mean over subtasks
    torch.testing.assert_close(found.scores, want, rtol=1e-5, atol=1e-6)
    means = torch.stack([(target[:2] * counts[:2, None]).mean(0), target[2] * counts[2]])
    paper = (unit @ functional.normalize(means, dim=1).T).amax(1)
    torch.testing.assert_close(less_scores([train], [wanted], [1.0], groups, how="paper", **given).scores, paper)


def test_advantages_of_prompts_and_of_groups():
    found = objectives.advantages([1, 0, 0, 4, 2], ["p", "p", "p", "q", "r"], [0, 0, 0, 1, 1])
    assert found.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 1, -1])


def pairs(swapped=False):
    rows = [
        {"prompt": f"say {i}", "chosen": f"yes {i}{i}", "rejected": f"never {i + 5}", "id": f"pair {i}"}
        for i in range(3)
    ]
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if swapped else row for row in rows]


POOL = [{"prompt": f"say {i}", "completion": ("yes " if i % 2 else "never ") + str(i)} for i in range(24)]


def test_preferences_as_a_target(model, tokenizer):
    """The scores are those of the difference: pairs the other way round give the opposite."""
    how = {"budget": 6, "method": "less", "settings": {**SMALL, "objective": "dpo", "aggregate": "mean"}}
    found = select(model, tokenizer, POOL, pairs(), **how)
    other = select(model, tokenizer, POOL, pairs(swapped=True), **how)
    np.testing.assert_allclose(found.scores["score"], -other.scores["score"], atol=2e-3)
    assert found.scores["score"].abs().max() > 0.01 and found.scores["nearest"].str.startswith("pair").all()
    plain = select(
        model,
        tokenizer,
        POOL,
        pairs(),
        **{**how, "settings": {**SMALL, "aggregate": "mean", "train.preference": "chosen"}},
    )
    assert not np.allclose(plain.scores["score"], found.scores["score"], atol=1e-2)
    assert "DPO loss" in found.summary["formula"]["text"]


def test_rewards_as_a_target(model, tokenizer):
    answers = [
        {"prompt": "say 1", "completion": "yes 1", "reward": 1.0},
        {"prompt": "say 1", "completion": "never 1", "reward": 0},
        {"prompt": "say 2", "completion": "yes 2", "reward": 3},
    ]
    settings = {**SMALL, "aggregate": "mean"}
    lone = {**settings, "objective": "reward"}
    subtasks = [{**row, "subtask": f"row {i}"} for i, row in enumerate(answers)]
    plain = select(model, tokenizer, POOL, subtasks, budget=6, method="less", settings=settings)
    similarity = plain.scores[[f"subtask:row {i}" for i in range(3)]].to_numpy()
    counts = np.array([0.5, -0.5, 3 - 4 / 3])  # the mean of its prompt, and for the prompt that stands alone, of all
    counts /= np.abs(counts).mean()
    found = select(model, tokenizer, POOL, answers, budget=6, method="less", settings=lone)
    np.testing.assert_allclose(found.scores["score"], (similarity * counts).mean(1), atol=1e-5)
    assert "A(z')" in found.summary["formula"]["text"]
    with pytest.raises(DataError, match=r"`reward` is 'None'.*target_columns reward=YOURS"):
        select(model, tokenizer, POOL, POOL[:2], budget=6, method="less", settings=lone)
    same = [{**row, "reward": 1} for row in answers]
    with pytest.raises(DataError, match="say nothing"):
        select(model, tokenizer, POOL, same, budget=6, method="less", settings=lone)


def test_what_is_refused(model, tokenizer):
    with pytest.raises(UsageError, match="takes none of this kind; use method less or gist"):
        select(model, tokenizer, POOL, pairs(), method="rds", settings={"objective": "dpo"})
    with pytest.raises(DataError, match="no rejected answer"):
        select(model, tokenizer, POOL, POOL[:2], method="less", settings={**SMALL, "objective": "dpo"})
    given = {"model": "m", "train": "p.jsonl", "target": "t.jsonl", "objective": "dpo"}
    assert SelectConfig(**given).train.preference == "chosen"
