"""Blocks of a transformer by name, and their learning rates."""

import re

import pytest
import torch

from optim import (
    OPTIMIZERS,
    AdamW,
    blockwise,
    create,
    example_parameters,
)
from optim.block_rates import PAPER_RATIOS
from optim.param_groups import divide_groups
from optim.roles import BLOCKS, block_of
from tests.optim.layers import FAMILIES, LAYER, by_rule, meta_model, model_of

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
    with pytest.raises(TypeError, match="finds matrices by name"):
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
            "blocks names 'wqe', which does not occur in the name of any parameter",
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


# ------------------------------------------------------------------------------------------ by name, for any optimizer


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
    assert message.startswith(f"the names of 5 of {len(names)} parameters do not show which block")
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


@pytest.mark.filterwarnings("ignore:.*do not show which block of a transformer")
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
