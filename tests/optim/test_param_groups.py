"""Blocks of a transformer by name, for the naming schemes of the common families; matrices and the rest."""

import pytest
import torch

from optim import OPTIMIZERS, AdamW, AdamWRule, MuonRule, blockwise, create, group_table, hf, is_matrix
from optim.param_groups import BLOCKS, PAPER_RATIOS, block_of, divide_groups, layouts

LAYER = "model.layers.0."
NAMES = {
    "embedding": [
        "model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "tok_embeddings.weight",
        "bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight",
        "gpt_neox.embed_in.weight", "base_model.model.model.embed_tokens.lora_embedding_A.default",
    ],
    "qk": [
        LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.q_proj.bias",
        "layers.0.attention.wq.weight", "layers.0.attention.wk.weight",
        "transformer.h.0.attn.q_attn.weight", "transformer.h.0.attn.k_attn.bias",
        "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.key.bias",
        "distilbert.transformer.layer.0.attention.q_lin.weight",
        "base_model.model." + LAYER + "self_attn.q_proj.lora_A.default.weight",
        "module._orig_mod." + LAYER + "_fsdp_wrapped_module.self_attn.k_proj.weight",
    ],
    "vo": [
        LAYER + "self_attn.v_proj.weight", LAYER + "self_attn.o_proj.weight", LAYER + "self_attn.dense.weight",
        LAYER + "self_attn.qkv_proj.weight", "layers.0.attention.wv.weight", "layers.0.attention.wo.weight",
        "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.attn.v_attn.weight", "bert.encoder.layer.0.attention.self.value.weight",
        "bert.encoder.layer.0.attention.output.dense.weight", "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.0.attention.dense.weight", "distilbert.transformer.layer.0.attention.out_lin.weight",
        "base_model.model.transformer.h.0.attn.c_proj.lora_B.default.weight",
    ],
    "ffn": [
        LAYER + "mlp.gate_proj.weight", LAYER + "mlp.down_proj.bias", LAYER + "mlp.gate_up_proj.weight",
        LAYER + "mlp.fc1.weight", "layers.0.feed_forward.w2.weight", "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.w1.weight",
        "bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0.output.dense.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", LAYER + "block_sparse_moe.experts.0.w1.weight",
        LAYER + "block_sparse_moe.gate.weight", "distilbert.transformer.layer.0.ffn.lin1.weight",
    ],
    "norm": [
        LAYER + "input_layernorm.weight", "model.norm.weight", LAYER + "self_attn.q_norm.weight",
        "transformer.h.0.ln_1.weight", "transformer.ln_f.bias", "model.final_layernorm.weight",
        "bert.embeddings.LayerNorm.weight", "bert.encoder.layer.0.attention.output.LayerNorm.bias",
        "layers.0.attention_norm.weight", LAYER + "mlp.norm.weight", "lm_head.layer_norm.weight", "embed_norm.weight",
    ],
    "head": [
        "lm_head.weight", "output.weight", "score.weight", "classifier.bias", "gpt_neox.embed_out.weight",
        "bert.pooler.dense.weight", "cls.predictions.transform.dense.weight", "cls.predictions.bias",
        "base_model.model.lm_head.lora_A.default.weight",
    ],
}


def test_every_block_has_names():
    assert set(NAMES) == set(BLOCKS)


@pytest.mark.parametrize(("block", "name"), [(block, name) for block, names in NAMES.items() for name in names])
def test_block_of(block, name):
    assert block_of(name) == block


@pytest.mark.parametrize("name", ["logit_scale", "conv1.weight", "mat", "0.weight", "model.layers.0.mixer.A_log"])
def test_unknown_names_are_errors(name):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        block_of(name)


# ---------------------------------------------------------------------------------------- blockwise learning rates


def named(names):
    return [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in names]


ALL = [name for names in NAMES.values() for name in names]


def test_blockwise_groups():
    """Every tensor is in one group, at the paper's ratio to the base; any optimizer takes the groups."""
    groups = blockwise(named(ALL), lr=1e-3)
    assert {group["block"] for group in groups} == set(BLOCKS)
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
    chosen = [names[0] for names in NAMES.values()]
    plain, ours = create(name, named(chosen), lr=0.01), create(name, named(chosen), lr=0.01, block_ratios="paper")
    before = {n: g for g in plain.param_groups for n in g["param_names"]}
    after = {n: g for g in ours.param_groups for n in g["param_names"]}
    assert sorted(after) == sorted(before) and sum(len(g["params"]) for g in ours.param_groups) == len(chosen)
    for n, group in after.items():
        assert group["lr"] == pytest.approx(before[n]["lr"] * PAPER_RATIOS[block_of(n)])
        assert (group["rule"], group["weight_decay"]) == (before[n]["rule"], before[n]["weight_decay"])


def test_own_ratios_and_blocks():
    names = ["transformer.wte.weight", "transformer.wpe.weight", "logit_scale"]
    table = {"embedding": 10, "position": 2.0, "scale": 0.5}
    groups = blockwise(named(names), lr=0.1, ratios=table, blocks={"wpe": "position", "logit_scale": "scale"})
    assert {g["block"]: g["lr"] for g in groups} == pytest.approx({"embedding": 1.0, "position": 0.2, "scale": 0.05})


@pytest.mark.parametrize(
    ("error", "part", "call"),
    [
        (ValueError, "'model.mystery'", lambda: blockwise(named([*ALL, "model.mystery"]), lr=1.0)),
        (ValueError, "'model.mystery'", lambda: create("lion", named(["model.mystery"]), lr=1.0, block_ratios="paper")),
        (ValueError, "'embedding', which has no ratio", lambda: blockwise(named(ALL), lr=1.0, ratios={"qk": 1.0})),
        (ValueError, "'papers'", lambda: blockwise(named(ALL), lr=1.0, ratios="papers")),
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
    assert {group["block"] for group in groups} == set(BLOCKS) - ({"qk"} if fused else set()) - (
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


def test_layouts():
    """GPT-2's Conv1D by its wider matrices, where nanoGPT has the same names; experts in one tensor."""
    gpt2 = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_proj.weight": (4, 4), "h.0.mlp.c_fc.weight": (4, 16),
            "h.0.mlp.c_proj.weight": (16, 4), "h.0.attn.c_attn.bias": (12,), "h.0.other.weight": (4, 12),
            "h.0.attn.c_attn.lora_A.default.weight": (2, 4)}  # fmt: skip
    turned = {name: {"transposed": True} for name in list(gpt2)[:4]}
    assert layouts(shaped(gpt2)) == turned
    assert layouts(shaped({name: shape[::-1] for name, shape in gpt2.items()})) == {}
    wrapped = {f"base_model.model.{name.replace('.weight', '.base_layer.weight')}": gpt2[name] for name in turned}
    assert set(layouts(shaped(wrapped))) == set(wrapped)
    assert layouts(shaped({"h.0.attn.c_proj.weight": (4, 4)})) == {}, "a square matrix tells nothing"
    experts = {"model.layers.0.mlp.experts.gate_up_proj": (4, 6, 3), "model.layers.0.mlp.experts.0.w1.weight": (6, 3)}
    assert layouts(shaped(experts)) == {"model.layers.0.mlp.experts.gate_up_proj": {"batched": True}}


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
    assert [group["param_names"] for group in groups][0] == ["up.weight"]


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
    optimizer = create("muon", shaped(LAYERS), lr=0.02, adamw_lr=3e-4, assign={"qkv": {"split_sizes": (4, 2, 2)}})
    head, *rows = (line.split() for line in group_table(optimizer).splitlines())
    assert head[:2] == ["group", "rule"] and len(rows) == 3
    assert " ".join(rows[0]) == f"1 muon, split_sizes (4, 2, 2) 0.02 0 1 32 {LAYER}self_attn.qkv_proj.weight"
    assert rows[1] == ["2", "muon", "0.02", "0", "2", "36", LAYER + "mlp.router.weight"]
    assert rows[2] == ["3", "adamw", "0.0003", "0", "3", "84", "model.embed_tokens.weight"]
    _, turned, plain = group_table(create("muon_8bit", shaped({"c_fc.weight": (2, 3), "x": (2, 2)}), lr=1)).splitlines()
    assert turned.split()[:4] == ["1", "muon_8bit,", "transposed", "True"], "of the rule inside, what differs"
    assert plain.split()[:3] == ["2", "muon_8bit", "1"]
    assert "adamw" in group_table(AdamW([torch.nn.Parameter(torch.ones(2))])), "parameters without names too"
