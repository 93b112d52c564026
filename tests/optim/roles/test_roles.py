"""What a parameter is and how its matrices lie: by names and shapes, by modules, and over real architectures."""

import re

import pytest
import torch
from torch import nn

from optim import UpdateMap, create, is_matrix
from optim.roles import Role, kind_of, layouts, roles
from tests.optim.harness import randn

LAYER = "model.layers.0."
KINDS = {
    "matrix": {
        LAYER + "self_attn.q_proj.weight": (8, 4),
        LAYER + "mlp.router.weight": (3, 4),
        LAYER + "mlp.gate.weight": (3, 4),
        LAYER + "mlp.router.classifier.weight": (3, 4),
        LAYER + "mlp.shared_expert_gate.weight": (1, 4),
        LAYER + "mlp.experts.gate_up_proj": (3, 8, 4),
        LAYER + "mlp.experts.0.w1.weight": (8, 4),
        LAYER + "feed_forward.output.weight": (4, 8),
        LAYER + "prenorm_block.attn.q_proj.weight": (4, 4),
        LAYER + "input_layernorm.mlp.fc1.weight": (4, 4),
        LAYER + "norm_attn_norm.attn.Wqkv.weight": (12, 4),
        LAYER + "normalizer.weight": (4, 4),
        LAYER + "norm_proj.weight": (4, 4),
        LAYER + "ada_norm.linear.weight": (8, 4),
        "roberta_prelayernorm.encoder.layer.0.output.dense.weight": (4, 8),
        "model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.q_proj.weight": (4, 4),
        "electra.embeddings_project.weight": (8, 4),
        "prophetnet.decoder.layers.0.self_attn.relative_pos_embeddings.weight": (8, 4),
        "backbone.layers.0.mixer.in_proj.weight": (16, 4),
        "backbone.layers.0.mixer.dt_proj.weight": (8, 2),
        LAYER + "mamba.x_proj_weight": (2, 6, 4),
        LAYER + "rg_lru.input_gate_weight": (2, 4, 4),
        "transformer.layer.0.rel_attn.q": (4, 2, 2),
        LAYER + "attn_hc.fn": (6, 8),
        "base_model.model." + LAYER + "q_proj.lokr_w1.own_name": (2, 2),
        "base_model.model." + LAYER + "q_proj.lora_B.own_name.weight": (4, 2),
        "conv.weight": (4, 3, 3),
        "mlp.w1": (3, 4),
        "0.weight": (3, 4),
        "mat": (3, 4),
        "base_model.model.lm_head.lora_A.default.weight": (2, 4),
        "base_model.model." + LAYER + "q_proj.base_layer.weight": (4, 4),
        "base_model.model." + LAYER + "q_proj.modules_to_save.default.weight": (4, 4),
        "base_model.model." + LAYER + "q_proj.hada_w1_a.default": (4, 2),
        "encoder.layers.0.conv.parametrizations.weight.original1": (8, 4, 3),
        "lstm.weight_ih_l0": (16, 4),
    },
    "embedding": {
        "model.embed_tokens.weight": (9, 4),
        "transformer.wpe.weight": (9, 4),
        "shared.weight": (9, 4),
        "transformer.w.weight": (9, 4),
        "tok_emb": (9, 4),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (9, 4),
        "embeddings.position_embeddings.weights.0": (9, 4),
        "vit.embeddings.patch_embeddings.projection.weight": (4, 3, 2, 2),
        "base_model.model.model.embed_tokens.modules_to_save.default.weight": (9, 4),
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default": (9, 4),
    },
    "head": {
        "lm_head.weight": (9, 4),
        "0.lm_head.weight": (9, 4),
        "output.weight": (9, 4),
        "decoder.weight": (9, 4),
        "cls.predictions.transform.dense.weight": (4, 4),
        "bert.pooler.dense.weight": (4, 4),
        "classifier.1.weight": (2, 4),
        "v_head.summary.weight": (1, 4),
        "generator_predictions.dense.weight": (4, 4),
        LAYER + "shared_head.head.weight": (9, 4),
        "depth_decoder.codebooks_head.weight": (3, 4, 9),
    },
    "adapter of an embedding": {"base_model.model.model.embed_tokens.lora_embedding_A.default": (2, 9)},
    "other": {
        LAYER + "self_attn.q_proj.bias": (8,),
        LAYER + "mlp.experts.down_proj_bias": (3, 4),
        LAYER + "mlp.gate.e_score_correction_bias": (1, 3),
        "transformer.layer.0.rel_attn.r_w_bias": (2, 4),
        LAYER + "attention.pos_bias_u": (2, 4),
        LAYER + "self_attn.compressor.position_bias": (2, 4),
        LAYER + "self_attn.q_norm.weight": (2, 4),
        LAYER + "self_attn.sinks": (4, 1),
        "backbone.layers.0.mixer.A_log": (8, 4),
        LAYER + "mamba.A_log": (2, 8, 4),
        LAYER + "mamba.D": (2, 8),
        LAYER + "mamba.dt_proj_bias": (2, 8),
        LAYER + "self_attn.forget_gate.A_log": (1, 1, 8, 1),
        "backbone.layers.0.mixer.conv1d.weight": (8, 1, 4),
        "encoder.layers.0.depthwise_conv.weight": (8, 1, 3, 3),
        LAYER + "k_sconv.static_weight": (4, 8),
        LAYER + "rel_logits_proj.proj": (4, 8),
        LAYER + "q_l2_clip.scale": (4, 8),
        "rwkv.blocks.0.attention.time_mix_key": (1, 1, 8),
        "rwkv.blocks.0.attention.time_maa_w1": (8, 5),
        "rwkv.blocks.0.attention.time_faaaa": (2, 4),
        "vit.embeddings.cls_token": (1, 1, 4),
        "vit.embeddings.position_embeddings": (1, 9, 4),
        "model.layers.0.attn.rel_pos_h": (7, 4),
        "projector.query": (1, 3, 4),
        LAYER + "attention_input.query": (3, 4),
        "encoder.blocks.0.layer_scale_1": (4, 1, 1),
        "base_model.model." + LAYER + "k_proj.ia3_l.default": (4, 1),
        "base_model.model." + LAYER + "q_proj.lora_E.own_name": (2, 1),
        "base_model.model." + LAYER + "q_proj.oft_R.default.weight": (2, 6),
        "encoder.layers.0.conv.parametrizations.weight.original0": (1, 1, 3),
        "logit_scale": (),
    },
}


@pytest.mark.parametrize(
    ("kind", "name", "shape"), [(kind, name, shape) for kind, of in KINDS.items() for name, shape in of.items()]
)
def test_kinds(kind, name, shape):
    param = torch.empty(shape, device="meta")
    assert kind_of(name, param) == kind
    assert is_matrix(name, param) == (kind == "matrix")
    wrapped = "module._orig_mod." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")
    assert kind_of(wrapped, param) == kind


class Odd(nn.Module):
    """Names that mislead."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(9, 4)
        self.embed = nn.ModuleList([nn.Linear(4, 4)])
        self.norm = nn.Linear(4, 4)
        self.query_norm = nn.RMSNorm((2, 4))
        self.stem = nn.Conv2d(1, 4, 3)
        self.mixing = nn.Conv1d(4, 4, 3, groups=4)
        self.last = nn.Linear(4, 9)

    def get_output_embeddings(self):
        return self.last


def test_the_types_of_modules_tell_more_than_names():
    model = Odd()
    named = list(model.named_parameters())
    want = {"codes.weight": "embedding", "embed.0.weight": "embedding", "norm.weight": "matrix",
            "query_norm.weight": "other", "stem.weight": "matrix", "mixing.weight": "other",
            "last.weight": "head"}  # fmt: skip
    told = roles(named, model)
    assert {n: r.kind for n, r in told.items() if n.endswith("weight")} == want
    assert all(r.kind == "other" for n, r in told.items() if n.endswith("bias"))
    by_name = {n: r.kind for n, r in roles(named).items()}
    assert {n for n in want if by_name[n] != want[n]} == {"codes.weight", "norm.weight", "stem.weight", "last.weight"}
    groups = create("muon", model, lr=0.1).param_groups
    assert set(groups[0]["param_names"]) == {"norm.weight", "stem.weight"}


def test_a_model_without_an_own_head_has_none():
    class Bare(nn.Linear):
        def get_output_embeddings(self):
            raise NotImplementedError

    model = Bare(3, 2)
    assert roles(model.named_parameters(), model)["weight"].kind == "matrix"


# ------------------------------------------------------------------------------------------------------------- layouts


def shaped(shapes):
    return [(name, torch.empty(shape, device="meta")) for name, shape in shapes.items()]


def lie(shapes):
    """own name -> (transposed, batched) of those that are not [outputs, inputs]."""
    found = {name: role.layout for name, role in roles(shaped(shapes)).items() if role.layout}
    return {name.rpartition("experts.")[2]: (v.get("transposed", False), v.get("batched", False))
            for name, v in found.items()}  # fmt: skip


EXPERTS = LAYER + "mlp.experts."
STRAIGHT, TURNED = (False, True), (True, True)


@pytest.mark.parametrize(
    ("up", "down", "want"),
    [
        ((3, 12, 4), (3, 4, 6), STRAIGHT),
        ((3, 4, 12), (3, 6, 4), TURNED),
        ((3, 8, 4), (3, 4, 4), STRAIGHT),  # a square `down`
        ((3, 4, 8), (3, 4, 4), TURNED),
        ((3, 8, 8), (3, 8, 4), STRAIGHT),  # a square `gate_up`
        ((3, 8, 8), (3, 4, 8), TURNED),
        ((5, 12, 4), (3, 4, 6), STRAIGHT),  # experts that compute nothing have a gate all the same
    ],
)
def test_fused_experts_are_told_by_their_pair(up, down, want):
    """gate_up has twice the inner size: one side is shared, so that the pair always tells."""
    assert lie({EXPERTS + "gate_up_proj": up, EXPERTS + "down_proj": down}) == {"gate_up_proj": want, "down_proj": want}


@pytest.mark.parametrize(("up", "down", "want"), [((3, 6, 4), (3, 4, 6), STRAIGHT), ((3, 4, 6), (3, 6, 4), TURNED)])
@pytest.mark.parametrize("names", [("up_proj", "down_proj"), ("w1", "w2"), ("fc1", "fc2"), ("gate_proj", "down_proj")])
@pytest.mark.parametrize(
    "beside",
    [
        {LAYER + "mlp.gate.weight": (3, 4)},
        {LAYER + "mlp.router.layer.weight": (3, 4)},
        {"model.embed_tokens.weight": (9, 4)},
    ],
)
def test_experts_without_a_fused_gate_are_told_by_the_width(up, down, want, names, beside):
    first, second = names
    assert lie({EXPERTS + first: up, EXPERTS + second: down} | beside) == {first: want, second: want}
    assert lie({EXPERTS + first: up, EXPERTS + second: down}) == dict.fromkeys(names, STRAIGHT), "nothing tells"


def test_experts_are_told_by_their_biases_and_by_themselves():
    up, down = {EXPERTS + "w_in": (3, 4, 6)}, {EXPERTS + "down_proj": (3, 6, 4)}
    assert lie(up | {EXPERTS + "w_in_bias": (3, 6)}) == {"w_in": TURNED}
    assert lie(up | {EXPERTS + "w_in_bias": (3, 4)}) == {"w_in": STRAIGHT}
    assert lie(down | {"model.embed_tokens.weight": (9, 4)}) == {"down_proj": TURNED}
    assert lie({EXPERTS + "linear.weight": (3, 4, 6), EXPERTS + "linear.bias": (3, 6)}) == {"linear.weight": TURNED}


def test_another_layers_router_tells_nothing():
    shapes = {EXPERTS + "up_proj": (3, 4, 6), "model.layers.1.mlp.gate.weight": (3, 4)}
    assert lie(shapes) == {"up_proj": STRAIGHT}
    found = roles(shaped({"model.layers.1.mlp.experts.up_proj": (3, 4, 6)} | shapes))
    assert found["model.layers.1.mlp.experts.up_proj"].layout == {"batched": True, "transposed": True}
    assert found[EXPERTS + "up_proj"].layout == {"batched": True}


def test_what_is_deep_inside_a_router_is_no_router():
    shapes = {EXPERTS + "up_proj": (3, 4, 6), "model.embed_tokens.weight": (9, 4)}
    assert lie(shapes | {LAYER + "mlp.router.net.inner.weight": (9, 6)}) == {"up_proj": TURNED}
    assert lie(shapes | {LAYER + "mlp.router.net.weight": (3, 6)}) == {"up_proj": STRAIGHT}


def test_stacks_under_other_names():
    """JetMoE's, Zamba's, a mixture whose names do not say so but whose router does; no convolutions."""
    jet = {LAYER + "mlp.input_linear.weight": (3, 12, 4), LAYER + "mlp.output_linear.weight": (3, 4, 6)}
    assert set(lie(jet).values()) == {STRAIGHT} and len(lie(jet)) == 2
    assert lie({LAYER + "mamba.x_proj_weight": (2, 6, 4)}) == {LAYER + "mamba.x_proj_weight": STRAIGHT}
    own = {LAYER + "ffn.wide": (3, 4, 6), LAYER + "ffn.router.weight": (3, 4)}
    assert lie(own) == {LAYER + "ffn.wide": STRAIGHT}
    assert lie({LAYER + "ffn.wide": (2, 4, 6), LAYER + "ffn.router.weight": (3, 4)}) == {}
    assert lie({"encoder.conv1.weight": (6, 4, 3), "funnel.blocks.0.0.attention.r_kernel": (4, 2, 2)}) == {}


def test_inputs_first_by_name():
    assert lie({"transformer.layer.0.rel_attn.q": (4, 2, 2), "transformer.layer.0.rel_attn.o": (4, 2, 2)}) == {
        "transformer.layer.0.rel_attn.q": (True, False)
    }
    gates = {LAYER + f"temporal_block.rg_lru.{which}_gate_weight": (2, 4, 4) for which in ("input", "recurrent")}
    assert set(lie(gates).values()) == {TURNED} and len(lie(gates)) == 2


def test_experts_one_below_the_other():
    """DBRX: [experts x size, width], of which `w2` maps from its rows; without the router nothing tells how many."""
    at = "transformer.blocks.0.ffn."
    stack = {at + f"experts.mlp.{name}": (12, 4) for name in ("w1", "v1", "w2")}
    found = lie(stack | {at + "router.layer.weight": (3, 4)})
    assert found == {"mlp.w1": (False, 3), "mlp.v1": (False, 3), "mlp.w2": (True, 3)}
    assert lie(stack) == lie(stack | {at + "router.layer.weight": (5, 4)}) == {}


def test_conv1d_is_told_by_biases_and_by_wider_matrices():
    """GPT-2's Conv1D, where nanoGPT has the same names for nn.Linear."""
    gpt2 = {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_proj.weight": (4, 4), "h.0.mlp.c_fc.weight": (4, 16),
            "h.0.mlp.c_proj.weight": (16, 4)}  # fmt: skip
    biases = {"h.0.attn.c_attn.bias": (12,), "h.0.mlp.c_fc.bias": (16,), "h.0.mlp.c_proj.bias": (4,)}
    others = {"h.0.other.weight": (4, 12), "h.0.attn.c_attn.lora_A.default.weight": (2, 4)}
    turned = {name: {"transposed": True} for name in gpt2}
    nano = {name: shape[::-1] for name, shape in gpt2.items()}
    for more in ({}, biases, others):
        assert layouts(shaped(gpt2 | {n: s for n, s in more.items() if len(s) > 1}), shaped(more)) == turned
        assert layouts(shaped(nano), shaped(more)) == {}
    wrapped = {f"base_model.model.{n.replace('.weight', '.base_layer.weight')}": s for n, s in gpt2.items()}
    assert set(layouts(shaped(wrapped))) == set(wrapped)
    assert layouts(shaped({"h.0.attn.c_proj.weight": (4, 4)})) == {}, "a square matrix tells nothing"
    assert set(layouts(shaped({"h.0.mlp.c_proj.weight": (16, 4), "h.0.attn.c_proj.weight": (4, 4)}))) == {
        "h.0.mlp.c_proj.weight", "h.0.attn.c_proj.weight",
    }  # fmt: skip
    assert layouts(shaped({"h.0.mlp.c_proj.weight": (4, 16)})) == {}
    mixed = {"a.map.weight": (4, 12), "b.map.weight": (4, 4), "c.fc.weight": (12, 4)}
    told = shaped({"a.map.bias": (12,), "b.map.bias": (4,), "c.fc.bias": (12,)})
    assert set(layouts(shaped(mixed), told)) == {"a.map.weight", "b.map.weight"}


def test_what_a_model_states_wins_over_shapes():
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.empty(3, 4, 4))

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))

    model = nn.ModuleDict({"experts": Experts(), "map": Conv1D()})
    named = list(model.named_parameters())
    assert roles(named) == {"experts.up_proj": Role("matrix", {"batched": True}), "map.weight": Role("matrix")}
    assert roles(named, model) == {
        "experts.up_proj": Role("matrix", {"batched": True, "transposed": True}),
        "map.weight": Role("matrix", {"transposed": True}),
    }


# ------------------------------------------------------------------------------------------------- real architectures

zoo = pytest.importorskip("tests.zoo.build")

CLASSES = zoo.names()[::12]
MIXTURES = ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM", "AriaTextForCausalLM",
            "NemotronHForCausalLM", "InklingForCausalLM", "JetMoeForCausalLM", "DbrxForCausalLM",
            "DeepseekV3ForCausalLM", "Qwen3NextForCausalLM"]  # fmt: skip
ODD = ["XLNetLMHeadModel", "RwkvForCausalLM", "MambaForCausalLM", "ZambaForCausalLM", "RecurrentGemmaForCausalLM",
       "ProphetNetForCausalLM", "GPT2LMHeadModel", "Gemma3nForCausalLM", "AXK2ForCausalLM",
       "RobertaPreLayerNormForCausalLM", "Inkling2ForCausalLM", "CTRLLMHeadModel"]  # fmt: skip
BEHIND = re.compile(r"^(cls|lm_head|generator_predictions|bert\.pooler|model\.patcher\.lm_head)\b|vision|visual|embed")
RAW = re.compile(r"expert|router|gate\.weight|rel_attn\.[qkvor]$|_(proj|gate)_weight$|_linear\.weight$|\.hc_?fn$|\.fn$")


@pytest.mark.parametrize("name", sorted({*CLASSES, *MIXTURES, *ODD} & set(zoo.names())))
def test_matrices_of_every_decoder_are_its_linear_layers_and_experts(name):
    """By types of modules, which names never see; the model given says the same as its names."""
    model = zoo.build(name)
    named = list(model.named_parameters())
    found = roles(named)
    told = roles(named, model)
    assert all((r.kind, r.layout) == (told[n].kind, told[n].layout) for n, r in found.items())
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    for n, p in named:
        owner, is_found = modules[n.rpartition(".")[0]], found[n].kind == "matrix"
        if isinstance(owner, nn.Embedding) or owner is head or p.ndim < 2:
            assert not is_found, n
        elif isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D":
            assert is_found or BEHIND.search(n), n
            assert bool(found[n].layout.get("transposed")) == (type(owner).__name__ == "Conv1D"), n
        elif isinstance(owner, nn.Conv1d | nn.Conv2d):
            assert is_found == (p.shape[1] > 1) or BEHIND.search(n), n
        else:
            assert not is_found or RAW.search(n), n
            assert is_found or not re.search(r"experts\.(\w+_)?proj$|router\.weight|(mlp|moe)\.gate\.weight$", n), n


@pytest.mark.parametrize("name", sorted(set(MIXTURES) & set(zoo.names())))
def test_the_inputs_of_experts_are_where_the_layout_says(name):
    """Told by running it: the gradient of a map from x is a sum of outer products with the x of each token."""
    model = zoo.build(name)
    named = dict(model.named_parameters())
    found = roles(named.items())
    owners = dict(model.named_modules())
    first = [n for n, p in named.items() if found[n].layout.get("batched")
             and re.search(r"gate|up|input|w1|v1", n.rpartition(".experts")[2]) and "down" not in n]  # fmt: skip
    assert first
    inputs = {}

    def keep(module, args):
        inputs[module] = args[0].detach().reshape(-1, args[0].shape[-1])

    holders = {n: owners[re.sub(r"(\.mlp\.[wv]1|\.weight|\.\w+)$", "", n)] for n in first}
    for holder in set(holders.values()):
        holder.register_forward_pre_hook(keep)
    # The last token predicts nothing and the first attends to itself alone: queries need one in between.
    tokens = torch.tensor([[zoo.FIRST_TOKEN, zoo.FIRST_TOKEN + 1, zoo.FIRST_TOKEN + 2]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    told = 0
    for n in first:
        p, role = named[n], found[n]
        if p.grad is None or holders[n] not in inputs:
            continue
        count = p.shape[0] if role.layout["batched"] is True else role.layout["batched"]
        grads = p.grad.reshape(count, -1, p.shape[-1])
        grads = grads.mT if role.layout.get("transposed") else grads
        x = inputs[holders[n]]
        if x.shape[-1] != grads.shape[-1]:
            assert x.shape[-1] not in grads.shape[-2:], n  # maps from another space than the layer's input
            continue
        basis = torch.linalg.qr(x.T).Q  # [inputs, tokens]
        beyond = grads - grads @ basis @ basis.T
        assert beyond.norm() < 1e-3 * grads.norm(), n
        told += bool(grads.norm() > 0)
    assert told


@pytest.mark.parametrize("name", ["muon", "normuon", "swan", "sinkgd", "scale", "root", "conda"])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_are_stepped_one_by_one_as_linear_layers(name, turned):
    """What `create` makes of a mixture's tensors is what it makes of each expert's own linear layers."""
    sides = {"gate_up_proj": (6, 4), "down_proj": (4, 3)}
    hyper = {"ns_dtype": "param"} if name in ("muon", "normuon", "root") else {}
    stacks, singles = {}, {}
    for i, (own, (rows, columns)) in enumerate(sides.items()):
        whole = randn((2, rows, columns), i)
        stacks[EXPERTS + own] = nn.Parameter((whole.mT if turned else whole).contiguous())
        singles |= {f"{EXPERTS}{e}.{own}.weight": nn.Parameter(whole[e].clone()) for e in range(2)}
    ours, theirs = (create(name, params.items(), lr=0.1, **hyper) for params in (stacks, singles))
    for t in range(2):
        for i, (own, (rows, columns)) in enumerate(sides.items()):
            grad = randn((2, rows, columns), 10 + 2 * t + i)
            stacks[EXPERTS + own].grad = (grad.mT if turned else grad).contiguous()
            for e in range(2):
                singles[f"{EXPERTS}{e}.{own}.weight"].grad = grad[e].clone()
        ours.step()
        theirs.step()
    for own in sides:
        got = stacks[EXPERTS + own].detach()
        want = torch.stack([singles[f"{EXPERTS}{e}.{own}.weight"].detach() for e in range(2)])
        torch.testing.assert_close(got.mT if turned else got, want, rtol=1e-9, atol=1e-11)
    assert UpdateMap.of(ours) is not None
