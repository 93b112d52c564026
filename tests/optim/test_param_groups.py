"""Matrices and the rest, for any optimizer, and the parameters without weight decay."""

import re
import warnings

import pytest
import torch

from optim import (
    AdamW,
    AdamWRule,
    LionRule,
    MuonRule,
    create,
    group_table,
    hf,
    is_matrix,
    without_decay,
)
from optim.block_rates import warn_of_strangers
from optim.roles import block_of
from tests.optim.layers import FAMILIES, LAYER, by_rule, meta_model, model_of, shaped

# ----------------------------------------------------------------------------------------------- matrices and the rest


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_a_real_architecture(family):
    """The hidden linear layers and no other, with their rows as outputs; blocks and matrices are told alike."""
    model, _ = model_of(family)
    linear = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and block_of(f"{name}.weight") not in ("head", "embedding")
    }
    assert len(linear) >= 8
    optimizer = create("normuon", model.named_parameters(), lr=0.02)
    *matrices, rest = optimizer.param_groups
    got = {n: group["rule"].transposed for group in matrices for n in group["param_names"]}
    assert got == {f"{name}.weight": kind == "Conv1D" for name, kind in linear.items()}
    assert isinstance(rest["rule"], AdamWRule) and rest["lr"] == pytest.approx(3e-4)
    for name, p in model.named_parameters():
        assert is_matrix(name, p) == (p.ndim > 1 and block_of(name) in ("qk", "vo", "ffn"))


LAYERS = {
    "model.embed_tokens.weight": (10, 4), LAYER + "self_attn.qkv_proj.weight": (8, 4),
    LAYER + "mlp.router.weight": (3, 4), LAYER + "mlp.up_proj.weight": (6, 4),
    LAYER + "input_layernorm.weight": (4,), "lm_head.weight": (10, 4),
}  # fmt: skip


def test_assign_wins_over_names_and_shapes():
    """The first part that a name holds; settings make groups of their own."""
    optimizer = create("muon", shaped(LAYERS), lr=0.1, weight_decay=0.2, assign={
        "router": "adamw", "qkv": {"split_sizes": (4, 2, 2), "lr": 0.3}, "lm_head": "matrix", "model": "adamw",
    })  # fmt: skip
    split, plain, rest = optimizer.param_groups
    assert split["param_names"] == [LAYER + "self_attn.qkv_proj.weight"] and split["lr"] == 0.3
    assert split["rule"] == MuonRule(split_sizes=(4, 2, 2)) and split["weight_decay"] == 0.2
    assert plain["param_names"] == ["lm_head.weight"] and plain["rule"] == MuonRule()
    assert rest["param_names"] == [n for n in LAYERS if n not in (*split["param_names"], *plain["param_names"])]


def test_rates_alone_do_not_make_a_matrix():
    """A bias beside an assigned matrix goes to AdamW at the assigned rate; fields of the rule are for tensors."""
    shapes = LAYERS | {LAYER + "self_attn.qkv_proj.bias": (8,)}
    optimizer = create("muon", shaped(shapes), lr=0.1, adamw_lr=0.2, assign={
        "qkv_proj": {"split_sizes": (4, 2, 2), "lr": 0.3}, "embed": {"lr": 0.4}, "up_proj": {"weight_decay": 0.5},
        "lm_head": {"momentum": 0.6, "lr": 0.7},
    })  # fmt: skip
    found = {n: (rule.name, lr, decay) for n, (rule, lr, decay) in by_rule(optimizer).items()}
    assert found == {
        LAYER + "self_attn.qkv_proj.weight": ("muon", 0.3, 0.0), LAYER + "self_attn.qkv_proj.bias": ("adamw", 0.3, 0.0),
        "model.embed_tokens.weight": ("adamw", 0.4, 0.0), LAYER + "mlp.up_proj.weight": ("muon", 0.1, 0.5),
        LAYER + "mlp.router.weight": ("muon", 0.1, 0.0), LAYER + "input_layernorm.weight": ("adamw", 0.2, 0.0),
        "lm_head.weight": ("muon", 0.7, 0.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("assign", "part"),
    [
        ({"routr": "adamw"}, "'routr', which does not occur in the name of any parameter"),
        (["router"], r"assign = \['router'\]; expected a mapping"),
        ({"router": "sgd"}, r"assign\['router'\] = 'sgd'; expected 'matrix', 'adamw' or a mapping"),
        ({"router": {"momentm": 0.9}}, "momentm"),
        ({"layernorm": "matrix"}, "not a matrix"),
        ({"model": "adamw", "lm_head": "adamw"}, "none of the parameters is a hidden matrix"),
    ],
)
def test_assignments_that_mean_nothing_are_refused(assign, part):
    with pytest.raises((TypeError, ValueError), match=part):
        create("muon", shaped(LAYERS), lr=0.1, assign=assign)


def test_assignments_wait_for_the_model_in_trainer():
    """`hf.resolve` tries settings on examples, which do not have the names that `assign` speaks of."""
    factory, hyper = hf.resolve("muon", lr=0.1, assign={"router": "adamw"})
    model = torch.nn.ModuleDict({"router": torch.nn.Linear(3, 2), "up": torch.nn.Linear(3, 2)})
    groups = factory()(model, **hyper).param_groups
    assert next(group["param_names"] for group in groups) == ["up.weight"]


def test_scale_takes_embeddings_and_heads_too():
    """Statistics over the vocabulary for embeddings, momentum for the head alone, AdamW for vectors."""
    optimizer = create("scale", shaped(LAYERS), lr=0.1, momentum=0.8)
    at = {n: g["rule"] for g in optimizer.param_groups for n in g["param_names"]}
    assert at["model.embed_tokens.weight"].axis == "outputs" and at["model.embed_tokens.weight"].momentum == 0
    assert at["lm_head.weight"].axis == "inputs" and at["lm_head.weight"].momentum == 0.8
    assert at[LAYER + "mlp.up_proj.weight"] == at[LAYER + "mlp.router.weight"] == type(at["lm_head.weight"])()
    assert isinstance(at[LAYER + "input_layernorm.weight"], AdamWRule)


def test_group_table():
    """What a user reads before training: every group, its rule and what differs in it, and how much it holds."""
    big = torch.nn.Parameter(torch.empty(1200, 1000, device="meta"))
    named_ones = [("model.embed_tokens.weight", big), *shaped(LAYERS)[1:]]
    optimizer = create("muon", named_ones, lr=0.02, weight_decay=0.125, adamw_lr=3e-4, adamw_weight_decay=0.0,
                       assign={"qkv": {"split_sizes": (4, 2, 2), "lr": torch.tensor(0.5)}})  # fmt: skip
    assert group_table(optimizer).splitlines() == [
        "group  rule                             lr  decay  tensors  parameters  first tensor",
        f"1      muon, split_sizes (4, 2, 2)     0.5  0.125        1          32  {LAYER}self_attn.qkv_proj.weight",
        f"2      muon                           0.02  0.125        2          36  {LAYER}mlp.router.weight",
        "3      adamw                        0.0003      0        3   1,200,044  model.embed_tokens.weight",
    ]
    _, turned, plain = group_table(create("muon_8bit", shaped({"c_fc.weight": (2, 3), "x": (2, 2)}), lr=1)).splitlines()
    assert turned.split()[:4] == ["1", "muon_8bit,", "transposed", "True"], "of the rule inside, what differs"
    assert plain.split()[:3] == ["2", "muon_8bit", "1"]
    assert group_table(AdamW([torch.nn.Parameter(torch.ones(2))])).splitlines() == [
        "group  rule      lr  decay  tensors  parameters  first tensor",
        "1      adamw  0.001   0.01        1           2",
    ], "parameters without names too"


# ------------------------------------------------------------------------------------------ by name, for any optimizer


def test_any_optimizer_takes_settings_by_name():
    optimizer = create("lion", shaped(LAYERS), lr=0.1, weight_decay=0.2, assign={
        "router": {"lr": 0.5, "betas": (0.5, 0.6)}, "layernorm": {"weight_decay": 0.0}, "layers": {"lr": 0.3},
    })  # fmt: skip
    found = by_rule(optimizer)
    assert found[LAYER + "mlp.router.weight"] == (LionRule(betas=(0.5, 0.6)), 0.5, 0.2)
    assert found[LAYER + "input_layernorm.weight"] == (LionRule(), 0.1, 0.0)
    assert found[LAYER + "mlp.up_proj.weight"] == (LionRule(), 0.3, 0.2)
    assert found["lm_head.weight"] == (LionRule(), 0.1, 0.2) and len(optimizer.param_groups) == 4
    mini = create("adam_mini", shaped(LAYERS), lr=0.1, assign={"router": {"blocks": "tensor"}, "up_proj": {"lr": 1.0}})
    assert by_rule(mini)[LAYER + "mlp.router.weight"][0].blocks == "tensor"
    assert by_rule(mini)[LAYER + "mlp.up_proj.weight"][1] == 1.0


@pytest.mark.parametrize(
    ("assign", "part"),
    [
        ({"routr": {"lr": 0.1}}, "'routr', which does not occur in the name of any parameter"),
        (["router"], r"assign = \['router'\]; expected a mapping"),
        ({"router": "matrix"}, r"assign\['router'\] = 'matrix'; expected a mapping with keys among"),
        ({"router": {"momentm": 0.9}}, "momentm"),
    ],
)
def test_settings_by_name_that_mean_nothing_are_refused(assign, part):
    with pytest.raises((TypeError, ValueError), match=part):
        create("lion", shaped(LAYERS), lr=0.1, assign=assign)


# --------------------------------------------------------------------------------------------- names that tell no block


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration",
                                  "WhisperForConditionalGeneration", "ModernBertForMaskedLM",
                                  "ViTForImageClassification"])  # fmt: skip
def test_matrices_of_encoders_and_of_encoder_decoders(name):
    """The linear layers that are no heads, and Whisper's convolutions behind its first."""
    model = meta_model(name)
    heads = ("lm_head", "proj_out", "decoder.weight", "classifier", "head.")
    linear = {f"{n}.weight" for n, m in model.named_modules()
              if isinstance(m, torch.nn.Linear) and not f"{n}.weight".startswith(heads)}  # fmt: skip
    convolutions = {"model.encoder.conv1.weight", "model.encoder.conv2.weight"} if "Whisper" in name else set()
    for given in (model, model.named_parameters()):
        groups = create("muon", given, lr=0.1).param_groups
        got = {n for g in groups for n in g["param_names"] if g["rule"].name == "muon"}
        assert got == linear | convolutions


# ------------------------------------------------------------------------------------ weight decay of norms and biases


def test_norms_and_biases_by_names_and_by_modules():
    model = torch.nn.ModuleDict({"ln_1": torch.nn.LayerNorm(4), "norm": torch.nn.RMSNorm(4),
                                 "map": torch.nn.Linear(4, 4), "scale": torch.nn.LayerNorm(4),
                                 "norms": torch.nn.RMSNorm(4)})  # fmt: skip
    by_module = {"ln_1.weight", "ln_1.bias", "norm.weight", "map.bias", "scale.weight", "scale.bias"}
    names = [name for name, _ in model.named_parameters()]
    assert without_decay(names, model) == by_module, "Trainer's: RMSNorm by its name alone"
    assert without_decay(names) == by_module - {"ln_1.weight", "scale.weight"}
    by_names = by_module - {"scale.weight"} | {"norms.weight"}
    for given, spared in ((model, by_module), (model.named_parameters(), by_names)):
        optimizer = create("adamw", given, lr=0.1, weight_decay=0.2, decay_all=False)
        assert {n for n, (_, _, decay) in by_rule(optimizer).items() if decay == 0.0} == spared
        assert {decay for _, _, decay in by_rule(optimizer).values()} == {0.0, 0.2}
    assert {decay for _, _, decay in by_rule(create("adamw", model, lr=0.1, weight_decay=0.2)).values()} == {0.2}
    inner = torch.nn.LayerNorm(4)
    inner.map = torch.nn.Linear(4, 4)  # in a norm, and none
    assert without_decay([n for n, _ in inner.named_parameters()], inner) == {"weight", "bias", "map.bias"}
    later = create("adamw", model, lr=0.1, weight_decay=0.2, decay_all=False)
    later.add_param_group({"params": shaped({"new.ln_2.weight": (4,), "new.map.weight": (4, 4), "new.b_bias": (4,)})})
    assert {n: d for n, (_, _, d) in by_rule(later).items() if n.startswith("new")} == {
        "new.ln_2.weight": 0.0, "new.map.weight": 0.2, "new.b_bias": 0.0,
    }  # fmt: skip
    muon = create("muon", model, lr=0.1, weight_decay=0.2, adamw_weight_decay=0.4, decay_all=False)
    assert {n: d for n, (_, _, d) in by_rule(muon).items() if d} == {"map.weight": 0.2, "norms.weight": 0.4}


def test_trainer_and_create_spare_the_same(tmp_path):
    """`hf.resolve` is `create` with the model, and without decay on norms and biases."""
    model = torch.nn.ModuleDict({"ln_1": torch.nn.LayerNorm(4), "map": torch.nn.Linear(4, 4)})
    factory, hyper = hf.resolve("lion", lr=0.1, weight_decay=0.2)
    assert by_rule(factory()(model, **hyper)) == by_rule(create("lion", model, decay_all=False, **hyper))
    factory, hyper = hf.resolve("lion", lr=0.1, weight_decay=0.2, decay_all=True, assign={"map": {"lr": 1.0}})
    assert by_rule(factory()(model, **hyper)) == by_rule(create("lion", model, **hyper))
    factory, hyper = hf.resolve("adam_mini", lr=0.1, blocks={"map": "tensor"})
    assert by_rule(factory()(model, **hyper))["map.weight"][0].blocks == "tensor"


def test_a_model_trains_what_requires_a_gradient():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = create("sgd", model, lr=0.1), AdamW(model), create("adam_mini", model, lr=0.1)
    assert all(set(by_rule(optimizer)) == {"a.weight", "a.bias"} for optimizer in made)


@pytest.mark.parametrize(("count", "shown"), [(1, "'s0.x'"), (3, "'s0.x', 's1.x', 's2.x'"),
                                             (4, "'s0.x', 's1.x', 's2.x', ...")])  # fmt: skip
def test_three_strangers_are_named(count, shown):
    told = re.escape(f"{count} of {count + 1} parameters") + ".*" + re.escape(f"({shown}): they stay")
    with pytest.warns(UserWarning, match=told):
        warn_of_strangers([*(f"s{i}.x" for i in range(count)), "lm_head.weight"], [], "stay", "{part}")
