"""Blocks of a transformer by name, for the naming schemes of the common families."""

import pytest
import torch

from optim import OPTIMIZERS, AdamW, blockwise, create
from optim.param_groups import BLOCKS, PAPER_RATIOS, block_of, divide_groups

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


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3", "phi", "phi3", "bert", "gpt_neox", "mistral"])
def test_every_parameter_of_a_real_architecture_has_a_block(family):
    """The names that transformers gives today; every family has all six blocks, as far as its layers go."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4,
             "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
    if family in ("llama", "qwen2", "qwen3", "mistral", "phi3"):
        small |= {"num_key_value_heads": 2, "head_dim": 4}
    config = transformers.AutoConfig.for_model(family, **small)
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    groups = blockwise(model.named_parameters(), lr=1.0)
    fused = family in ("gpt2", "phi3", "gpt_neox")  # query, key and value in one matrix: "vo"
    tied = family in ("gpt2", "qwen2") and config.tie_word_embeddings
    assert {group["block"] for group in groups} == set(BLOCKS) - ({"qk"} if fused else set()) - (
        {"head"} if tied else set()
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
