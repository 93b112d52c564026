"""Blocks of a transformer by name, for the naming schemes of the common families."""

import pytest

from optim.param_groups import BLOCKS, block_of

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
