"""Groups that are added later are divided in the same way."""

import copy

import pytest
import torch

from optim import (
    OPTIMIZERS,
    AdamWRule,
    create,
)
from tests.optim.layers import LAYER, by_rule, shaped


def halves():
    """Two halves of the parameters of a small mixture, and both."""
    first = {
        "model.embed_tokens.weight": (9, 4), LAYER + "self_attn.q_proj.weight": (4, 4), LAYER + "norm.weight": (4,),
        "lm_head.weight": (9, 4), LAYER + "self_attn.o_proj.weight": (4, 4), LAYER + "self_attn.o_proj.bias": (4,),
    }  # fmt: skip
    second = {
        "model.layers.1.mlp.experts.gate_up_proj": (2, 4, 12), "model.layers.1.mlp.experts.down_proj": (2, 6, 4),
        "model.layers.1.mlp.experts.down_proj_bias": (2, 4), "model.layers.1.norm.weight": (4,),
        "model.layers.1.self_attn.k_proj.weight": (4, 4),
    }  # fmt: skip
    return shaped(first), shaped(second), shaped(first | second)


@pytest.mark.parametrize(("ratios", "decay_all"), [(None, True), ("paper", False)])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_group_that_comes_later_is_divided_in_the_same_way(name, ratios, decay_all):
    """As if it had been there from the start; a copy of the optimizer does the same."""
    first, second, both = halves()
    settings = {"lr": 0.1, "weight_decay": 0.3, "block_ratios": ratios, "decay_all": decay_all}
    assign = {"o_proj": {"lr": 0.7}}
    whole, later = (create(name, given, assign=assign, **settings) for given in (both, first))
    for optimizer in (later, copy.deepcopy(later)):
        optimizer.add_param_group({"params": iter(second)})
        assert by_rule(optimizer) == by_rule(whole)
        assert all(group["params"] for group in optimizer.param_groups)
        if name == "muon":
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert len(optimizer.state) == len(both)


def test_a_later_group_has_settings_of_its_own():
    first, second, _ = halves()
    optimizer = create("normuon", first, lr=0.02, weight_decay=0.1)
    own = {"lr": 0.5, "weight_decay": 0.2, "momentum": 0.8, "adamw_eps": 1e-3, "tag": "late"}
    optimizer.add_param_group({"params": second} | own)
    *_, straight, rest = optimizer.param_groups
    assert straight["rule"].momentum == 0.8 and straight["lr"] == 0.5 and straight["weight_decay"] == 0.2
    assert rest["rule"].name == "adamw" and rest["rule"].eps == 1e-3 and rest["weight_decay"] == 0.2
    assert rest["lr"] == pytest.approx(3e-4), "the rate that the optimizer has for AdamW"
    assert straight["tag"] == rest["tag"] == "late"

    muon = create("muon", first, lr=0.02)
    muon.add_param_group({"params": second[:2] + second[2:], "lr": 0.5})
    assert {float(g["lr"]) for g in muon.param_groups[2:]} == {0.5}, "one rate for both, as at first"
    for key in ("adamw_lr", "adamw_weight_decay"):
        muon = create("muon", first, lr=0.02)
        muon.add_param_group({"params": second, key: 0.25})
        assert muon.param_groups[-1][key.removeprefix("adamw_")] == 0.25 != muon.param_groups[-2].get(key)


def test_a_later_group_with_a_rule_is_left_as_it_is():
    first, second, _ = halves()
    optimizer = create("muon", first, lr=0.02)
    optimizer.add_param_group({"params": second[:1], "rule": AdamWRule(), "lr": 1.0})
    assert optimizer.param_groups[-1]["rule"] == AdamWRule() and len(optimizer.param_groups) == 3


@pytest.mark.parametrize(
    ("error", "part", "group"),
    [
        (TypeError, "finds matrices by name", lambda p: [p]),
        (TypeError, "finds matrices by name", lambda p: p),
        (ValueError, "more than one parameter group", lambda p: [("new.weight", p)]),
        (TypeError, "int", lambda p: [("a.weight", p), ("b.weight", torch.ones(2, 2, dtype=torch.int64))]),
    ],
)
def test_a_later_group_that_is_refused_leaves_nothing(error, part, group):
    first, _, _ = halves()
    optimizer = create("muon", first, lr=0.02)
    before = by_rule(optimizer)
    fresh = dict(first)["lm_head.weight"] if "more" in part else torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(error, match=part):
        optimizer.add_param_group({"params": group(fresh)})
    assert by_rule(optimizer) == before


def test_muon_with_a_rate_of_its_own_needs_adamws_for_later_vectors_too():
    first, second, _ = halves()
    optimizer = create("muon", [first[1]], lr=0.02, convention="keller_jordan")
    with pytest.raises(ValueError, match=r"scale 'original'.*down_proj_bias.*pass adamw_lr"):
        optimizer.add_param_group({"params": second, "lr": 0.5})
    optimizer.add_param_group({"params": second, "adamw_lr": 3e-4})
    assert optimizer.param_groups[-1]["lr"] == 3e-4 and len(optimizer.param_groups) == 5


def test_later_groups_of_a_model_are_told_by_its_modules():
    """Also what was frozen at first."""
    model = torch.nn.ModuleDict({"codes": torch.nn.Embedding(5, 4), "norm": torch.nn.Linear(4, 4),
                                 "map": torch.nn.Linear(4, 4)})  # fmt: skip
    for name in ("codes", "norm"):
        model[name].requires_grad_(False)
    optimizer = create("muon", model, lr=0.1)
    assert [g["param_names"] for g in optimizer.param_groups] == [["map.weight"], ["map.bias"]]
    optimizer.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if not p.requires_grad]})
    rules = {n: rule.name for n, (rule, _, _) in by_rule(optimizer).items()}
    assert rules == {"map.weight": "muon", "map.bias": "adamw", "norm.weight": "muon", "norm.bias": "adamw",
                     "codes.weight": "adamw"}  # fmt: skip
