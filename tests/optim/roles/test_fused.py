"""Fused matrices: what one tensor contains, and that rules for matrices step its parts as separate ones."""

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomModel,
    CodeGenConfig,
    CodeGenModel,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2Model,
    GPTBigCodeConfig,
    GPTBigCodeModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    GptOssConfig,
    GptOssModel,
    MixtralConfig,
    MixtralModel,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    Phi3Model,
)

from optim import create, fused_note
from optim.roles import roles

SMALL = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = SMALL | {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2,
}  # fmt: skip
GPT = SMALL | {"n_embd": 8, "n_layer": 1, "n_head": 4}
FALCON = SMALL | {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
NEOX = FALCON | {"intermediate_size": 12}
MIXTURE = LLAMA | {"num_local_experts": 3}

CASES = {
    "gpt2": (GPT2Model, GPT2Config(**GPT, add_cross_attention=True),
             {"attn.c_attn": ((8, 8, 8), 1), "crossattention.c_attn": ((8, 8), 1)}),
    "phi3": (Phi3Model, Phi3Config(**LLAMA), {"qkv_proj": ((8, 4, 4), 1), "gate_up_proj": ((12, 12), 1)}),
    "modernbert": (ModernBertModel, ModernBertConfig(**NEOX), {"Wqkv": ((8, 8, 8), 1), "Wi": ((12, 12), 1)}),
    "mixtral": (MixtralModel, MixtralConfig(**MIXTURE), {"gate_up_proj": ((12, 12), 1)}),
    "gpt_oss": (GptOssModel, GptOssConfig(**MIXTURE), {"gate_up_proj": ((1, 1), 12)}),
    "neox": (GPTNeoXModel, GPTNeoXConfig(**NEOX), {"query_key_value": ((2, 2, 2), 4)}),
    "bloom": (BloomModel, BloomConfig(**GPT, hidden_size=8), {"query_key_value": ((2, 2, 2), 4)}),
    "falcon, by head": (FalconModel, FalconConfig(**FALCON, multi_query=False, new_decoder_architecture=False),
                        {"query_key_value": ((2, 2, 2), 4)}),
    "falcon, one key": (FalconModel, FalconConfig(**FALCON, multi_query=True, new_decoder_architecture=False),
                        {"query_key_value": ((8, 2, 2), 1)}),
    "falcon, groups": (FalconModel, FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
                       {"query_key_value": ((4, 2, 2), 2)}),
    "bigcode": (GPTBigCodeModel, GPTBigCodeConfig(**GPT), {"c_attn": ((8, 2, 2), 1)}),
    "bigcode, by head": (GPTBigCodeModel, GPTBigCodeConfig(**GPT, multi_query=False), {"c_attn": ((2, 2, 2), 4)}),
    "codegen": (CodeGenModel, CodeGenConfig(**GPT, rotary_dim=2), {"qkv_proj": ((2, 2, 2), 4)}),
}  # fmt: skip
BY_MODEL = {"gpt_oss", "neox", "bloom", "falcon, by head", "falcon, one key", "falcon, groups", "codegen"}


def parts_of(found):
    return {
        name.removesuffix(".weight"): (tuple(role.parts["split_sizes"]), role.parts.get("split_groups", 1))
        for name, role in found.items()
        if role.parts
    }


@pytest.mark.parametrize("case", CASES)
def test_parts_are_those_that_the_model_computes_with(case):
    kind, config, want = CASES[case]
    with torch.device("meta"):
        model = kind(config)
    found = parts_of(roles(model.named_parameters(), model))
    assert {key: value for key, value in want.items() if not any(n.endswith(key) for n in found)} == {}
    for name, parts in found.items():
        assert parts == next(value for key, value in want.items() if name.endswith(key)), name
    by_name = parts_of(roles(model.named_parameters()))
    if case in BY_MODEL:
        assert by_name == {}
    elif case != "bigcode, by head":  # whose names and shapes are those of nanoGPT
        assert by_name == found


class Attention(nn.Module):
    def __init__(self, names=("qkv", "proj"), rows=24):
        super().__init__()
        self.add_module(names[0], nn.Linear(8, rows))
        self.add_module(names[1], nn.Linear(8, 8))


def test_what_names_alone_say():
    for names, rows, want in [
        (("qkv", "proj"), 24, (8, 8, 8)),
        (("Wqkv", "out_proj"), 12, (8, 2, 2)),
        (("c_attn", "c_proj"), 24, (8, 8, 8)),  # nanoGPT's is a linear layer
        (("wqkv", "wo"), 12, None),  # InternLM2 has groups, gpt-fast has not
        (("qkv_proj", "out_proj"), 24, None),
        (("qkv", "proj"), 11, None),
        (("gate_up_proj", "down_proj"), 16, (8, 8)),
        (("gate_up_proj", "down_proj"), 15, None),
        (("dense_h_to_4h", "dense_4h_to_h"), 8, None),  # not gated
        (("in_proj", "out_proj"), 16, None),  # Mamba's
    ]:
        module = Attention(names, rows)
        found = roles(module.named_parameters())[f"{names[0]}.weight"]
        assert found.kind == "matrix" and found.parts.get("split_sizes") == want, names
    layer = nn.MultiheadAttention(8, 2)
    assert roles(layer.named_parameters(), layer)["in_proj_weight"].parts == {"split_sizes": (8, 8, 8)}
    experts = {f"experts.gate_up_proj{x}": torch.empty((3, 8, 24)[: 3 - len(x) // 5]) for x in ("", "_bias")}
    experts["experts.down_proj"] = torch.empty(3, 12, 8)
    assert not roles(experts.items())["experts.gate_up_proj"].parts, "GPT-OSS has gate and up in turn, others do not"


@pytest.mark.parametrize("name", ["muon", "normuon", "rmnp", "swan", "sinkgd", "root", "soap", "shampoo"])
def test_query_key_and_value_are_stepped_as_three_layers(name):
    """The steps of the fused tensor are those of three layers."""
    torch.manual_seed(0)
    hyper = {"ns_dtype": "float32"} if name in ("muon", "normuon") else {}
    fused, apart = Attention(), nn.ModuleDict({key: nn.Linear(8, 8) for key in ("q_proj", "k_proj", "v_proj")})
    for layer, rows in zip(apart.values(), fused.qkv.weight.detach().split(8), strict=True):
        layer.weight.data.copy_(rows)
    start = fused.qkv.weight.detach().clone()
    one, three = create(name, fused, lr=0.1, **hyper), create(name, apart, lr=0.1, **hyper)
    for t in range(3):
        grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(t))
        fused.qkv.weight.grad = grad
        for layer, rows in zip(apart.values(), grad.split(8), strict=True):
            layer.weight.grad = rows
        one.step(), three.step()
    got, want = fused.qkv.weight.detach(), torch.cat([layer.weight.detach() for layer in apart.values()])
    assert not torch.equal(want, start)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_default_can_be_turned_off_and_given_settings_take_precedence():
    def settings(name="muon", rows=24, **options):
        optimizer = create(name, Attention(rows=rows), lr=0.1, adamw_lr=0.1, **options)
        rule = next(g["rule"] for g in optimizer.param_groups if "qkv.weight" in g["param_names"])
        return rule.split_sizes, rule.num_heads, fused_note(optimizer)

    assert settings() == (
        (8, 8, 8), None,
        "1 fused matrix is stepped as separate ones (qkv.weight); split_fused=False steps it whole",
    )  # fmt: skip
    sizes, heads, note = settings(split_fused=False)
    assert sizes is None and heads is None and note.startswith("1 fused matrix is stepped whole (qkv.weight), because")
    assert settings(convention="torch")[0] is None and settings(convention="torch", split_fused=True)[0] == (8, 8, 8)
    assert settings(assign={"qkv": {"split_sizes": (12, 12)}})[0] == (12, 12)
    assert settings(assign={"qkv": {"lr": 0.2}})[0] == (8, 8, 8)
    assert settings(num_heads=2)[:2] == (None, 2)
    assert settings("soap")[:2] == (None, 3) and settings("soap", rows=12)[:2] == (None, None)
    assert settings("conda")[:2] == (None, None)
    assert create("muon_8bit", Attention(), lr=0.1).param_groups[0]["split_sizes"] == (8, 8, 8)
    with pytest.raises(ValueError, match="split_fused"):
        settings(split_fused="no")
    assert fused_note(create("adamw", Attention(), lr=0.1)) == ""


def test_a_state_of_whole_matrices_is_not_blamed_on_the_order_of_parameters():
    for name in ("muon", "muon_8bit"):
        saved, other = (create(name, Attention(), lr=0.1, split_fused=split) for split in (False, True))
        with pytest.raises(ValueError, match=r"stepped fused matrices .* whole, .* build it with split_fused=False"):
            other.load_state_dict(saved.state_dict())
        with pytest.raises(ValueError, match=r"as separate ones, .* build it with split_fused=True"):
            saved.load_state_dict(other.state_dict())
