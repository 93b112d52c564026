"""Blocks of a transformer by name, for the naming schemes of the common families; matrices and the rest."""

import copy
import re
import warnings

import pytest
import torch

from optim import (
    OPTIMIZERS,
    AdamW,
    AdamWRule,
    LionRule,
    MuonRule,
    blockwise,
    create,
    example_parameters,
    group_table,
    hf,
    is_matrix,
    without_decay,
)
from optim.block_rates import PAPER_RATIOS, warn_of_strangers
from optim.param_groups import divide_groups
from optim.roles import BLOCKS, block_of

LAYER = "model.layers.0."
NAMES = {
    "embedding": [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "tok_embeddings.weight",
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "shared.weight",
        "model.decoder.embed_positions.weight",
        "vit.embeddings.patch_embeddings.projection.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A.default",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
    ],
    "qk": [
        LAYER + "self_attn.q_proj.weight",
        LAYER + "self_attn.k_proj.weight",
        LAYER + "self_attn.q_proj.bias",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "transformer.h.0.attn.q_attn.weight",
        "transformer.h.0.attn.k_attn.bias",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.key.bias",
        "distilbert.transformer.layer.0.attention.q_lin.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "prophetnet.decoder.layers.0.cross_attn.key_proj.weight",
        LAYER + "self_attn.indexer.wq_b.weight",
        "base_model.model." + LAYER + "self_attn.q_proj.lora_A.default.weight",
        "module._orig_mod." + LAYER + "_fsdp_wrapped_module.self_attn.k_proj.weight",
    ],
    "vo": [
        LAYER + "self_attn.v_proj.weight",
        LAYER + "self_attn.o_proj.weight",
        LAYER + "self_attn.dense.weight",
        LAYER + "self_attn.qkv_proj.weight",
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "gpt_neox_japanese.layers.1.attention.dense_bias",
        "transformer.h.0.attn.in_proj_weight",
        "transformer.h.0.attn.v_attn.weight",
        "bert.encoder.layer.0.attention.self.value.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.0.attention.dense.weight",
        "decoder.block.0.layer.1.EncDecAttention.o.weight",
        LAYER + "encoder_attn.out_proj.bias",
        "model.layers.0.attn.Wo.weight",
        LAYER + "self_attn.o_a_proj.weight",
        "distilbert.transformer.layer.0.attention.out_lin.weight",
        "base_model.model.transformer.h.0.attn.c_proj.lora_B.default.weight",
    ],
    "ffn": [
        LAYER + "mlp.gate_proj.weight",
        LAYER + "mlp.down_proj.bias",
        LAYER + "mlp.gate_up_proj.weight",
        LAYER + "mlp.fc1.weight",
        "layers.0.feed_forward.w2.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.w1.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
        LAYER + "block_sparse_moe.experts.0.w1.weight",
        LAYER + "block_sparse_moe.gate.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "model.layers.0.mlp.Wo.weight",
        LAYER + "mlp.experts.gate_up_proj_bias",
        LAYER + "mlp.router.weight",
        "distilbert.transformer.layer.0.ffn.lin1.weight",
    ],
    "norm": [
        LAYER + "input_layernorm.weight",
        "model.norm.weight",
        LAYER + "self_attn.q_norm.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.ln_f.bias",
        "model.final_layernorm.weight",
        "bert.embeddings.LayerNorm.weight",
        "bert.encoder.layer.0.attention.output.LayerNorm.bias",
        "layers.0.attention_norm.weight",
        "vit.layernorm.weight",
        "backbone.norm_f.weight",
        "embeddings.norm.weight",
        LAYER + "mlp.norm.weight",
        "lm_head.layer_norm.weight",
        "embed_norm.weight",
    ],
    "head": [
        "lm_head.weight",
        "output.weight",
        "score.weight",
        "classifier.bias",
        "gpt_neox.embed_out.weight",
        "bert.pooler.dense.weight",
        "decoder.bias",
        "head.dense.weight",
        "lm_head.dense.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.bias",
        "base_model.model.lm_head.lora_A.default.weight",
    ],
    "other": [
        "logit_scale",
        "conv1.weight",
        "mat",
        "0.weight",
        "backbone.layers.0.mixer.A_log",
        LAYER + "self_attn.sinks",
        "backbone.layers.0.mixer.conv1d.weight",
        LAYER + "linear_attn.dt_bias",
        "model.encoder.conv2.bias",
    ],
}


def test_every_block_has_names():
    assert set(NAMES) == set(BLOCKS)


@pytest.mark.parametrize(("block", "name"), [(block, name) for block, names in NAMES.items() for name in names])
def test_block_of(block, name):
    assert block_of(name) == block


# ---------------------------------------------------------------------------------------- blockwise learning rates


def named(names):
    return [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in names]


KNOWN = {block: names for block, names in NAMES.items() if block != "other"}
ALL = [name for names in KNOWN.values() for name in names]


def test_blockwise_groups():
    """Every tensor is in one group, at the paper's ratio to the base; any optimizer takes the groups."""
    groups = blockwise(named(ALL), lr=1e-3)
    assert {group["block"] for group in groups} == set(KNOWN)
    for group in groups:
        assert [name for name, _ in group["params"]] == NAMES[group["block"]]
        assert group["lr_ratio"] == PAPER_RATIOS[group["block"]]
        assert group["lr"] == pytest.approx(1e-3 * group["lr_ratio"])
    for make in (AdamW, torch.optim.AdamW):
        optimizer = make(groups, lr=1.0, weight_decay=0.1)
        assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]
        assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups), "norms too, as in the paper"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_create_with_block_ratios_divides_any_optimizer(name):
    """Also those that make groups of their own; nothing is lost, and nothing but the rates changes."""
    chosen = [names[0] for names in KNOWN.values()]
    plain, ours = create(name, named(chosen), lr=0.01), create(name, named(chosen), lr=0.01, block_ratios="paper")
    before = {n: g for g in plain.param_groups for n in g["param_names"]}
    after = {n: g for g in ours.param_groups for n in g["param_names"]}
    assert sorted(after) == sorted(before) and sum(len(g["params"]) for g in ours.param_groups) == len(chosen)
    for n, group in after.items():
        assert group["lr"] == pytest.approx(before[n]["lr"] * PAPER_RATIOS[block_of(n)])
        assert (group["rule"], group["weight_decay"]) == (before[n]["rule"], before[n]["weight_decay"])


def test_examples_to_try_settings_on_hold_no_memory():
    for ratios in (None, "paper", {"qk": 1.0, "head": 2.0}, {"own": 1.0}):
        examples = example_parameters(ratios)
        assert all(p.device.type == "meta" and p.shape == (5040, 5040) for _, p in examples), ratios
        names = [block_of(name) for name, _ in examples]
        assert names == {"own": ["ffn"], "qk": ["qk", "head"]}.get(
            next(iter(ratios or ()), ""), ["embedding", "qk", "vo", "ffn", "head"]
        )


def test_the_papers_ratios():
    assert dict(PAPER_RATIOS) == {
        "embedding": 10, "qk": 8, "ffn": 6, "vo": 4, "norm": 1, "head": 1, "other": 1,
    }  # fmt: skip


def test_divided_groups_keep_every_setting_and_no_empty_part():
    """Of torch's optimizers too, which divide nothing later."""
    for optimizer in (AdamW(named(["a", "b", "c"]), lr=0.1), torch.optim.AdamW(named(["a", "b", "c"]), lr=0.1)):
        optimizer.param_groups[0]["tag"] = "kept"

        def divide(group):
            assert [n for n, _ in group["params"]] == ["a", "b", "c"] and "param_names" not in group
            return [{**group, "params": group["params"][:1], "lr": 0.5}, {**group, "params": []},
                    {**group, "params": group["params"][1:]}]  # fmt: skip

        divide_groups(optimizer, divide)
        first, second = optimizer.param_groups
        assert (first["param_names"], first["lr"], first["tag"]) == (["a"], 0.5, "kept")
        assert (second["param_names"], second["lr"], second["tag"]) == (["b", "c"], 0.1, "kept")
        assert all(isinstance(p, torch.nn.Parameter) for g in optimizer.param_groups for p in g["params"])
        assert getattr(optimizer, "divisions", [divide]) == [divide]


def test_param_groups_of_named_parameters_are_divided_each():
    """`create` takes them where the class does: settings of a group hold for its parts."""
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    optimizer = create("muon", [{"params": named(names), "lr": 0.5}, {"params": named(["x.q_proj.weight"])}], lr=0.1)
    assert {n: (rule.name, lr) for n, (rule, lr, _) in by_rule(optimizer).items()} == {
        names[0]: ("muon", 0.5), names[1]: ("adamw", 0.5), "x.q_proj.weight": ("muon", 0.1),
    }  # fmt: skip
    with pytest.raises(TypeError, match="tells matrices by name"):
        create("muon", [{"params": [torch.nn.Parameter(torch.ones(2, 2))]}], lr=0.1)


def test_own_ratios_and_blocks():
    names = ["transformer.wte.weight", "transformer.wpe.weight", "logit_scale"]
    table = {"embedding": 10, "position": 2.0, "scale": 0.5}
    groups = blockwise(named(names), lr=0.1, ratios=table, blocks={"wpe": "position", "logit_scale": "scale"})
    assert {g["block"]: g["lr"] for g in groups} == pytest.approx({"embedding": 1.0, "position": 0.2, "scale": 0.05})


@pytest.mark.parametrize(
    ("error", "part", "call"),
    [
        (
            ValueError,
            "blocks names 'wqe', which is in the name of no parameter",
            lambda: blockwise(named(ALL), lr=1.0, blocks={"wqe": "qk"}),
        ),
        (ValueError, "'embedding', which has no ratio", lambda: blockwise(named(ALL), lr=1.0, ratios={"qk": 1.0})),
        (ValueError, "'papers'", lambda: blockwise(named(ALL), lr=1.0, ratios="papers")),
        *(
            (
                ValueError,
                f"the ratio of block 'qk' is {re.escape(repr(ratio))}; it must be a finite number above 0",
                lambda ratio=ratio: blockwise(named(ALL), lr=1.0, ratios={"qk": ratio}),
            )
            for ratio in (0, 0.0, float("inf"), float("nan"), True, "8", None)
        ),
        (TypeError, "names", lambda: blockwise([("a", torch.ones(1)), torch.ones(1)], lr=1.0)),
        (TypeError, "names", lambda: blockwise([(1, torch.ones(1))], lr=1.0)),
        (TypeError, "names", lambda: blockwise([("a", torch.ones(1), 1)], lr=1.0)),
        (TypeError, "names", lambda: blockwise(torch.ones(1), lr=1.0)),
        (ValueError, "block 'qk' is -1", lambda: blockwise(named(ALL), lr=1.0, ratios={"qk": -1})),
        (TypeError, "names", lambda: blockwise([torch.ones(1)], lr=1.0)),
        (ValueError, "by name", lambda: divide_groups(AdamW([torch.nn.Parameter(torch.ones(1))]), lambda n, lr: [])),
    ],
)
def test_refusals(error, part, call):
    with pytest.raises(error, match=part):
        call()


def model_of(family):
    """A model of two layers without data, and its configuration."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
             "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
    if family in ("llama", "qwen2", "qwen3", "mistral", "phi3"):
        small |= {"num_key_value_heads": 2, "head_dim": 4}
    config = transformers.AutoConfig.for_model(family, **small)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config), config


FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "phi", "phi3", "bert", "gpt_neox", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_real_architecture_has_a_block(family):
    """The names that transformers gives today; every family has all six blocks, as far as its layers go."""
    model, config = model_of(family)
    groups = blockwise(model.named_parameters(), lr=1.0)
    fused = family in ("gpt2", "phi3", "gpt_neox")  # query, key and value in one matrix: "vo"
    tied = family in ("gpt2", "qwen2") and config.tie_word_embeddings
    assert {group["block"] for group in groups} == set(KNOWN) - ({"qk"} if fused else set()) - (
        {"head"} if tied else set()
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


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


def shaped(shapes):
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


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
        ({"routr": "adamw"}, "'routr', which is in the name of no parameter"),
        (["router"], r"assign = \['router'\]; expected a mapping"),
        ({"router": "sgd"}, r"assign\['router'\] = 'sgd'; expected 'matrix', 'adamw' or settings"),
        ({"router": {"momentm": 0.9}}, "momentm"),
        ({"layernorm": "matrix"}, "no matrix"),
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


# ----------------------------------------------------------------------------------------------- groups that come later


def by_rule(optimizer):
    """name -> (rule, lr, weight decay)."""
    return {n: (g["rule"], float(g["lr"]), g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]}


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
        (TypeError, "tells matrices by name", lambda p: [p]),
        (TypeError, "tells matrices by name", lambda p: p),
        (ValueError, "more than one parameter group", lambda p: [("lm_head.weight", p), ("new.weight", p)]),
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
    with pytest.raises(ValueError, match=r"scale 'original'.*down_proj_bias.*give adamw_lr"):
        optimizer.add_param_group({"params": second, "lr": 0.5})
    optimizer.add_param_group({"params": second, "adamw_lr": 3e-4})
    assert optimizer.param_groups[-1]["lr"] == 3e-4 and len(optimizer.param_groups) == 4


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
        ({"routr": {"lr": 0.1}}, "'routr', which is in the name of no parameter"),
        (["router"], r"assign = \['router'\]; expected a mapping"),
        ({"router": "matrix"}, r"assign\['router'\] = 'matrix'; expected settings out of"),
        ({"router": {"momentm": 0.9}}, "momentm"),
    ],
)
def test_settings_by_name_that_mean_nothing_are_refused(assign, part):
    with pytest.raises((TypeError, ValueError), match=part):
        create("lion", shaped(LAYERS), lr=0.1, assign=assign)


def test_blocks_by_name_go_with_ratios_or_with_adam_mini():
    names = ["backbone.layers.0.mixer.A_log", "lm_head.weight"]
    groups = create("adamw", named(names), lr=0.1, block_ratios="paper", blocks={"A_log": "ffn"}).param_groups
    assert {g["block"]: float(g["lr"]) for g in groups} == pytest.approx({"ffn": 0.6, "head": 0.1})
    mini = create("adam_mini", named(names), lr=0.1, blocks={"A_log": "ffn"}, block_ratios="paper")
    assert by_rule(mini)[names[0]][1] == pytest.approx(0.6) and by_rule(mini)[names[0]][0].blocks == "row"
    for blocks, more in (({"A_log": "ffn"}, {}), ("row", {"block_ratios": "paper"})):
        with pytest.raises(TypeError, match="'adamw' has no blocks; .*block_ratios"):
            create("adamw", named(names), lr=0.1, blocks=blocks, **more)


# --------------------------------------------------------------------------------------------- names that tell no block


def test_what_is_in_no_block_has_the_base_rate_and_is_named_once():
    names = ["backbone.layers.0.mixer.A_log", *(f"backbone.layers.{i}.mixer.conv1d.weight" for i in range(4)), *ALL]
    with pytest.warns(UserWarning) as seen:
        groups = blockwise(named(names), lr=0.1)
    (message,) = [str(w.message) for w in seen]
    assert message.startswith(f"5 of {len(names)} parameters are in no block")
    assert re.search(r"\('backbone.layers.0.mixer.A_log', '[^']*0[^']*', '[^']*1[^']*', \.\.\.\)", message)
    assert message.endswith("blocks={'A_log': 'norm'}")
    other = next(g for g in groups if g["block"] == "other")
    assert (other["lr"], other["lr_ratio"], len(other["params"])) == (0.1, 1.0, 5)
    quiet = blockwise(named(names), lr=0.1, ratios=dict(PAPER_RATIOS) | {"other": 0.5})
    assert next(g for g in quiet if g["block"] == "other")["lr"] == 0.05, "who gives it a ratio knows of it"
    blockwise(named(names), lr=0.1, blocks={"A_log": "norm", "conv1d": "ffn"})
    with pytest.warns(UserWarning, match="'mat'"):
        create("lion", named(["mat"]), lr=1.0, block_ratios={"qk": 2.0})


OTHERS = ["T5ForConditionalGeneration", "ModernBertForMaskedLM", "GptOssForCausalLM", "Qwen3NextForCausalLM",
          "MambaForCausalLM", "WhisperForConditionalGeneration", "BartForConditionalGeneration",
          "ViTForImageClassification"]  # fmt: skip


def meta_model(name):
    """A model of two layers without data."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    config = kind.config_class()
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 2)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[-2:]
    with torch.device("meta"):
        return kind(config)


@pytest.mark.filterwarnings("ignore:.*in no block of a transformer")
@pytest.mark.parametrize("name", OTHERS)
def test_every_architecture_has_blocks_and_adam_mini(name):
    """Encoder-decoders, encoders, vision, mixtures and state-space models: nothing is refused, few are in no block."""
    model = meta_model(name)
    for create_from in (model, list(model.named_parameters())):
        mini = create("adam_mini", create_from, lr=0.1, weight_decay=0.1, head_dim=64)
        ratios = create("adamw", create_from, lr=0.1, block_ratios="paper")
        for optimizer in (mini, ratios):
            trained = {n for n, p in model.named_parameters() if p.requires_grad or create_from is not model}
            assert set(by_rule(optimizer)) == trained
    numbers = dict.fromkeys(BLOCKS, 0)
    for n, p in model.named_parameters():
        numbers[block_of(n)] += p.numel()
    assert numbers["other"] < 0.02 * sum(numbers.values()) or "Mamba" in name
    for n, (rule, _, decay) in by_rule(mini).items():
        p = dict(model.named_parameters())[n]
        if p.ndim == 1 and block_of(n) != "norm":
            assert rule.blocks in ("element", "tensor")
        if p.ndim == 3 and "experts" in n:
            assert rule.blocks == p.shape[-1], "one second moment for each row of each expert"
        assert (decay == 0) == (n.endswith("bias") or block_of(n) == "norm"), n


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
