"""Features that cost no pass: tables, the choice where some are unknown, weights, and by-products of training."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from datatools import BY_PRODUCTS, CORESET_METHODS, CoLM, DataError, FeatureTable, Selection, UsageError
from datatools.colm import correct_expectation, plan
from datatools.colm.given import choose_given
from datatools.colm.logits import logit_numbers
from datatools.subsets.herding import herding
from datatools.subsets.importance import importance, inclusion
from pipelines.models.losses import row_losses, token_losses


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_table_keeps_what_is_finite_and_forgets_what_is_too_old():
    table = FeatureTable([5, 9, 2], limit=3)
    assert table.take([9], step=0).isnan().all()
    table.put([9, 2], torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), step=1)
    assert table.take([9, 2, 5], step=4).tolist()[0] == [1.0, 2.0]
    assert table.take([9, 2, 5], step=4)[1:].isnan().all() and table.take([9], step=5).isnan().all()
    assert table.ages([9, 2], step=5) == [4]
    again = FeatureTable([5, 9, 2])
    again.load_state_dict(table.state_dict())
    assert again.take([9], step=99).tolist() == [[1.0, 2.0]]
    with pytest.raises(DataError, match="belong to other rows"):
        FeatureTable([5, 9, 3]).load_state_dict(table.state_dict())
    with pytest.raises(ValueError, match="a table of width 2"):
        table.put([5], torch.zeros(1, 3), step=2)


# --------------------------------------------------------------------------------------------------------------- choice


def test_unknown_rows_get_their_share_of_each_quota_at_random():
    sources = ["rare"] * 2 + ["web"] * 12 + ["code"] * 6
    made = plan(sources, 11, {"rare"}, generator=generator())
    features = torch.randn(20, 4, generator=generator())
    features[2:8] = torch.nan  # half of web
    drawn = set()
    for seed in range(30):
        chosen = choose_given(features, made, method="herding", generator=generator(seed))
        picks = chosen.indices.tolist()
        assert picks[:2] == [0, 1] and len(set(picks)) == 11
        assert sum(2 <= i < 8 for i in picks) == 3 == sum(8 <= i < 14 for i in picks)
        drawn |= {i for i in picks if 2 <= i < 8}
    assert drawn == set(range(2, 8))
    nothing = choose_given(torch.full((20, 1), torch.nan), made, method="herding", generator=generator())
    assert len(nothing) == 11 and nothing.weights.tolist() == [1.0] * 11
    known = torch.randn(20, 4, generator=generator())
    from datatools.colm import choose_rows

    whole = choose_given(known, made, method="herding", generator=generator())
    assert whole.indices.tolist() == choose_rows(known, made, method="herding", generator=generator()).indices.tolist()


@pytest.mark.parametrize("keep", [3, 6])
def test_every_row_is_kept_as_often_as_its_share(keep):
    """Also a single unknown row where less than half of the rows are kept, and a source of one row."""
    sources = ["web"] * 11 + ["code"] * 4 + ["maths"]
    features = torch.randn(16, 4, generator=generator())
    features[[2, 12, 13]] = torch.nan
    drawn, kept = 3000, torch.zeros(16)
    for seed in range(drawn):
        g = generator(seed)
        made = plan(sources, keep, generator=g)
        kept[choose_given(features, made, method="random_in_source", generator=g).indices] += 1
    share = keep / 16
    error = (share * (1 - share) / drawn) ** 0.5
    assert (kept / drawn - share).abs().max() < 4 * error


def test_weights_give_each_source_its_share_and_are_bounded():
    sources = ["code"] + ["maths"] * 3 + ["web"] * 12
    chosen = Selection(torch.tensor([0, 1, 4, 5]), weights=torch.tensor([1.0, 1.0, 2.0, 1.0]))
    fair = correct_expectation(chosen, sources, bound=100)
    assert fair.weights.tolist() == pytest.approx([4 / 16, 12 / 16, 2.0, 1.0])
    assert correct_expectation(chosen, sources, bound=1.5).weights.max() == 1.5
    lost = correct_expectation(Selection(torch.tensor([0, 4])), sources, bound=100)  # maths has no row
    assert lost.weights.tolist() == pytest.approx([2 / 13, 24 / 13])
    empty = correct_expectation(Selection(torch.tensor([0]), weights=torch.zeros(1)), sources, bound=4)
    assert empty.weights.tolist() == [0.0]


def test_importance_is_unbiased_with_the_stated_chances():
    """Every row's share of 4,000 draws is its probability, and the weighted mean is the mean."""
    rows = torch.randn(12, 3, generator=generator(1)) * torch.arange(1, 13)[:, None]
    chances = inclusion(rows.norm(dim=1), 5)
    assert chances.sum() == pytest.approx(5) and chances.max() <= 1
    seen, total, g = torch.zeros(12), torch.zeros(3), generator(2)
    for _ in range(4000):
        found = importance(rows, 5, generator=g)
        assert len(set(found.indices.tolist())) == 5
        seen[found.indices] += 1
        total += (found.weights[:, None] * rows[found.indices]).sum(0) / 5
    torch.testing.assert_close(seen / 4000, chances.float(), atol=0.03, rtol=0)
    torch.testing.assert_close(total / 4000, rows.mean(0), atol=0.25, rtol=0)
    assert inclusion(torch.zeros(4), 2).tolist() == [0.5] * 4
    assert importance(torch.zeros(3, 1), 3, generator=g).indices.tolist() == [0, 1, 2]


def test_logits_are_summarized_by_their_nuclear_norm_and_distances():
    z = torch.randn(9, 40, generator=generator())
    where = torch.tensor([0] * 5 + [2] * 4)
    found = logit_numbers(z, where, 3)
    assert found.shape == (3, 1025) and not found[1].any()
    for row in (0, 2):
        assert float(found[row, 0]) == pytest.approx(float(torch.linalg.svdvals(z[where == row]).sum()), rel=1e-5)
    assert float(found[0, 1:].norm() / z[:5].norm()) == pytest.approx(1, abs=0.35)


# ---------------------------------------------------------------------------------------------------------- by-products


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        )


def batch(seed=0, rows=4):
    ids = torch.randint(3, 60, (rows, 9), generator=generator(seed))
    labels = ids.clone()
    for i in range(rows):
        labels[i, : 2 + i] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_seen_in_passing_are_the_exact_ones(model, checkpointing):
    """Whatever the weights of rows in the loss, in two micro-batches, with recomputed activations or without."""
    model.eval()
    colm = CoLM(model, row_losses, keep=2, features="stale", dim=64)
    want = torch.cat([colm.measured(batch(seed)) for seed in (0, 1)])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    seen = colm.by_products("gradient")
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    with seen.watching():
        for seed in (0, 1):
            given = batch(seed)
            losses, where = token_losses(model, given)
            seen.watch([10 * seed + i for i in range(4)], losses, where)
            tokens = torch.bincount(where, minlength=4)
            (3.0 * losses * (weights / tokens)[where]).sum().backward()
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    numbers, found = seen.taken()
    assert numbers == [0, 1, 2, 3, 10, 11, 12, 13]
    assert found[[2, 6]].isnan().all(), "a row without weight shows nothing"
    rest = [0, 1, 3, 4, 5, 7]
    torch.testing.assert_close(found[rest], want[rest], rtol=1e-4, atol=1e-6)
    assert not model.model.layers[-1].self_attn.v_proj._forward_hooks


@pytest.mark.parametrize("name", ["loss", "logits"])
def test_losses_and_logits_seen_in_passing_are_those_of_a_pass(model, name):
    model.eval()
    colm = CoLM(model, row_losses, keep=2, features="stale")
    seen, given = colm.by_products(name), batch()
    with seen.watching():
        losses, where = token_losses(model, given)
        seen.watch([1, 2, 3, 4], losses, where)
        losses.sum().backward()
    model.zero_grad()
    from datatools import CORESET_FEATURES

    kind = CORESET_FEATURES[BY_PRODUCTS[name].kind]
    want = kind.measure(model, row_losses, given, colm.target, torch.zeros(0), eps=0.0)
    torch.testing.assert_close(seen.taken()[1], want, rtol=1e-4, atol=1e-4)


def test_what_trains_nothing_before_the_matrix_is_told(model):
    model.eval().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    seen = CoLM(model, row_losses, keep=2, features="stale").by_products("gradient")
    with seen.watching():
        losses, where = token_losses(model, batch())
        seen.watch([0, 1, 2, 3], losses, where)
        losses.sum().backward()
    with pytest.raises(DataError, match="no gradient of .* was seen while LlamaForCausalLM trained"):
        seen.taken()


def test_expectation_is_that_of_the_large_batch_where_sources_are_rounded_to_nothing(model):
    """Sources of one row, of which 3 of 8 rows are kept, and one that is kept whole: each row counts 1/8 on average."""
    colm = CoLM(model, row_losses, keep=3, features="stored", method="random_in_source", small={"rare"}, max_weight=9)
    total, given, sources = torch.zeros(8), batch(rows=8), ["a", "b", *["c"] * 5, "rare"]
    given["labels"] = given["input_ids"]
    for step in range(1500):
        found = colm(given, sources, step=step, given=torch.zeros(8, 1))
        assert float(found.weights.sum()) == pytest.approx(3)
        total[found.indices] += found.weights / 3
    torch.testing.assert_close(total / 1500, torch.full((8,), 1 / 8), atol=0.02, rtol=0)


@pytest.mark.parametrize("features", ["exact", "stale"])
def test_keeping_every_row_asks_no_method(model, features):
    """Not even for target rows; and no row is weighted."""
    for method in CORESET_METHODS:
        colm = CoLM(model, row_losses, keep=4, features=features, method=method)
        found = colm(batch(), ["a", "b", "a", "a"], step=0, given=torch.randn(4, 1) if features == "stale" else None)
        assert sorted(found.indices.tolist()) == [0, 1, 2, 3] and found.weights.tolist() == [1.0] * 4, method


def test_given_features_are_used_and_asked_for(model):
    """Herding on the given features, without a pass: the model may not even be called."""
    colm = CoLM(model, row_losses, keep=2, features="stored", weights="uniform")
    features = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = colm(batch(), ["a"] * 4, step=0, given=features)
    handle.remove()
    assert not calls and found.indices.tolist() == herding(features, 2).indices.tolist()
    watched = colm(batch(), ["a"] * 4, step=0, given=features, watch=True)
    assert colm.last.match_error > 0 and watched.indices.tolist() == found.indices.tolist()
    for wrong in (None, features[:3], features[:, 0]):
        with pytest.raises(UsageError, match="needs features of all 4 rows"):
            colm(batch(), step=0, given=wrong)
    with pytest.raises(UsageError, match="rule='adam' needs gradients"):
        CoLM(model, row_losses, keep=2, features="stale", rule="adam")
