"""Gradients of the last value projection: replay equals the full pass, features brute force; nothing is touched."""

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from datatools import DataError
from datatools.colm.exact import exact_gradients
from datatools.colm.last_layer import LastLayer
from datatools.colm.paper_code import central_differences
from datatools.colm.probes import directional_derivatives
from datatools.colm.replay import evaluating, replaying
from datatools.gradients import pieces
from pipelines.models.losses import row_losses
from tests.zoo import build as zoo

BASE = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 3, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
                            eos_token_id=2)  # fmt: skip
        return GPT2LMHeadModel(config)
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
        "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**BASE)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GROUPED)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**BASE)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=90, hidden_size=32, n_layer=3, n_head=4)),
        "deepseek": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**BASE, **LATENT)),
        "one-layer": lambda: LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})),
    }[name]()


ARCHITECTURES = ["llama", "llama-tied", "qwen2", "qwen3", "phi", "phi3", "gpt2", "neox", "deepseek", "one-layer"]
LORA = {"deepseek": ["kv_b_proj"], "gpt2": ["c_attn"], "phi3": ["qkv_proj"], "neox": ["query_key_value"]}


def adapted(name):
    """With LoRA whose B is not zero, dropout, in training mode: as in the middle of a run."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.3, target_modules=LORA.get(name, ["v_proj"]),
                          task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")  # fmt: skip
    model = get_peft_model(build(name), settings)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p, std=0.1)
    return model


def some_batch(n=5, width=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (n, width), generator=g)
    labels = ids.clone()
    lengths = [width - i % 8 for i in range(n)]
    for i, length in enumerate(lengths):
        ids[i, length:], labels[i, length:], labels[i, : 3 + i % 4] = 0, -100, -100
    return {"input_ids": ids, "labels": labels}, lengths


def brute(model, batch, target):
    """One backward pass a row through the whole model, by torch's own words."""
    was = model.training
    model.eval()
    found = []
    asked = target.parameter.requires_grad
    target.parameter.requires_grad_(True)
    for i in range(len(batch["input_ids"])):
        loss = row_losses(model, {k: v[i : i + 1] for k, v in batch.items()}).sum()
        (grad,) = torch.autograd.grad(loss, target.parameter)
        found.append((grad.T if target.transposed else grad)[target.outputs])
    target.parameter.requires_grad_(asked)
    model.train(was)
    return torch.stack(found)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_of_every_architecture(name, lora):
    """exact = brute force; probes = exact . z; differences = exact . z up to eps^2; the model is as it was."""
    model = adapted(name) if lora else build(name)
    model.train()
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))).eval()  # kept
    target = LastLayer.of(model)
    batch, _ = some_batch()
    want = brute(model, batch, target)
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = {k: p.requires_grad for k, p in model.named_parameters()}
    state = torch.get_rng_state()

    directions = torch.randn(3, *target.shape, generator=torch.Generator().manual_seed(1))
    with evaluating(model):
        grads = exact_gradients(model, row_losses, batch, target)
        slopes = directional_derivatives(model, row_losses, batch, target, directions, chunk=2)
        steps = central_differences(model, row_losses, batch, target, directions[0], eps=1e-3)

    torch.testing.assert_close(grads, want, rtol=1e-4, atol=1e-6)
    along = torch.einsum("nij,kij->nk", want, directions)
    torch.testing.assert_close(slopes, along, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps, along[:, 0], rtol=2e-2, atol=2e-3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert [m.training for m in model.modules()] == modes
    assert {k: p.requires_grad for k, p in model.named_parameters()} == asked
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_gives_the_losses_of_the_full_pass_with_padding_on_either_side(name):
    model = build(name).eval()
    target = LastLayer.of(model)
    batch, lengths = some_batch()
    left = {k: v.clone() for k, v in batch.items()}
    for key, empty in (("input_ids", 0), ("labels", -100)):
        for i, length in enumerate(lengths):
            left[key][i] = torch.cat([torch.full((14 - length,), empty), batch[key][i, :length]])
    left["attention_mask"] = torch.stack([(torch.arange(14) >= 14 - length).long() for length in lengths])
    for each in (batch, left):
        with torch.no_grad():
            full = row_losses(model, each)
            with replaying(model, row_losses, each, target):
                again = row_losses(model, each)
        torch.testing.assert_close(again, full, rtol=0, atol=1e-6)


def test_nothing_before_the_projection_is_kept_for_a_backward_pass():
    """Not even where the embeddings ask for gradients, as they do for adapters with gradient checkpointing."""
    model, (batch, _) = adapted("llama"), some_batch()
    model.train()
    target, sizes, grads = LastLayer.of(model), [], []
    for asking in (False, True):
        if asking:
            model.enable_input_require_grads()
        kept = []
        with (
            evaluating(model),
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
            ),
        ):
            grads.append(exact_gradients(model, row_losses, batch, target))
            assert torch.is_grad_enabled()
        sizes.append(sum(kept))
    assert sizes[0] == sizes[1] > 0 and torch.equal(*grads)


def test_only_the_last_layer_runs_again():
    model = build("llama").eval()
    calls = []
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    batch, _ = some_batch()
    target = LastLayer.of(model)
    calls.clear()
    central_differences(model, row_losses, batch, target, torch.ones(target.shape))
    assert calls == [0, 1, 2, 2]


def test_the_matrix_is_the_value_part_of_the_last_layer():
    shapes = {name: LastLayer.of(build(name)).shape for name in ARCHITECTURES}
    assert shapes == {
        "llama": (16, 32), "llama-tied": (16, 32), "qwen2": (16, 32), "qwen3": (16, 32), "phi": (32, 32),
        "phi3": (16, 32), "gpt2": (32, 32), "neox": (32, 32), "deepseek": (32, 8), "one-layer": (16, 32),
    }  # fmt: skip
    assert LastLayer.of(adapted("llama")).name.endswith("layers.2.self_attn.v_proj.lora_B.default.weight")
    assert LastLayer.of(adapted("llama")).shape == (16, 3)


def test_a_projection_without_an_adapter_gives_its_weight():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    target = LastLayer.of(model)
    assert target.name.endswith("v_proj.weight") and not target.parameter.requires_grad
    batch, _ = some_batch()
    with evaluating(model):
        grads = exact_gradients(model, row_losses, batch, target)
    torch.testing.assert_close(grads, brute(model, batch, target), rtol=1e-4, atol=1e-6)


def test_unknown_architectures_say_what_was_looked_for():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    with pytest.raises(DataError, match=r"no value projection.*blocks\.1.*looked for v_proj.*found.*\['0'\]"):
        LastLayer.of(Odd())
    assert LastLayer.of(Odd(), "blocks.1.0").shape == (4, 4), "and can be named"
    with pytest.raises(DataError, match="no layer 'blocks.1.7'"):
        LastLayer.of(Odd(), "blocks.1.7")
    with pytest.raises(DataError, match="no decoder found"):
        LastLayer.of(nn.Linear(3, 3))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(DataError, match="encoder-decoder"):
        LastLayer.of(t5)


def test_probes_of_layers_that_cannot_be_differentiated_forwards():
    """Bloom's activation has only a backward pass; HRM stops gradients where a forward derivative would go on."""
    for name in ("BloomForCausalLM", "HrmTextForCausalLM"):
        model, (batch, _) = zoo.build(name, dtype=torch.float64), some_batch()
        target = LastLayer.of(model)
        assert not target.forwards
        z = torch.randn(3, *target.shape, generator=torch.Generator().manual_seed(1))
        slopes = directional_derivatives(model, row_losses, batch, target, z)
        along = torch.einsum("nij,kij->nk", brute(model, batch, target).float(), z)
        torch.testing.assert_close(slopes, along, rtol=1e-4, atol=1e-5)


def test_two_adapters_are_refused():
    from peft import LoraConfig

    model = adapted("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(DataError, match="expected one active LoRA adapter"):
        LastLayer.of(model)


def test_bfloat16_slopes_agree_with_float32():
    """What differences of losses do not: their rounding alone is larger than the slopes."""
    model = build("llama").eval()
    batch, _ = some_batch(12)
    z = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(1))
    exact = directional_derivatives(model, row_losses, batch, LastLayer.of(model), z)
    model.bfloat16()
    half = LastLayer.of(model)
    slopes = directional_derivatives(model, row_losses, batch, half, z)
    grads = exact_gradients(model, row_losses, batch, half)
    assert slopes.dtype == grads.dtype == torch.float32
    for found in (slopes, torch.einsum("nij,kij->nk", grads, z)):
        assert float((found - exact).norm() / exact.norm()) < 0.05


def test_pieces_cut_padding_and_keep_rows():
    batch, lengths = some_batch()
    mask = torch.stack([(torch.arange(14) < length).long() for length in lengths])
    seen = []
    for rows, part in pieces(batch | {"attention_mask": mask}, None, 28):
        assert part["input_ids"].numel() <= 28 and part["input_ids"].shape == part["attention_mask"].shape
        assert part["attention_mask"].any(0).all(), "no column of padding alone"
        seen += rows.tolist()
    assert sorted(seen) == list(range(5))
    assert next(p["input_ids"].shape for _, p in pieces(batch, lengths, 28)) == (2, 14)


# ------------------------------------------------------------------------------------------ the specification's numbers


class Quadratic(nn.Module):
    """L_i = (a_i . w - y_i)^2 / 2 as a decoder of one layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"v_proj": nn.Linear(3, 1, bias=False)})])
        self.layers[0].forward = lambda hidden_states: self.layers[0]["v_proj"](hidden_states)
        self.layers[0]["v_proj"].weight.data = torch.tensor([[0.5, -0.5, 0.25]])

    def forward(self, x):
        return self.layers[0](x)[:, 0]


def test_worked_differences_of_the_specification():
    """spec/colm.md section 3.4: central differences of quadratics are exact."""
    model = Quadratic().double()
    batch = {
        "input_ids": torch.tensor([[1, 0, 2], [0, 1, -1], [2, 1, 0], [1, 1, 1]], dtype=torch.float64),
        "labels": torch.tensor([0.5, 0, 2, -1], dtype=torch.float64),
    }

    def losses(module, b):
        return (module(b["input_ids"]) - b["labels"]).square() / 2

    z = torch.tensor([[1.2, -0.4, 0.8]], dtype=torch.float64)
    found = central_differences(model, losses, batch, LastLayer.of(model), z, eps=1e-3)
    torch.testing.assert_close(found, torch.tensor([1.4, 0.9, -3.0, 2.0]), rtol=1e-6, atol=0)
    features = found[:, None] * z.float()
    want = torch.tensor([[1.68, -0.56, 1.12], [1.08, -0.36, 0.72], [-3.6, 1.2, -2.4], [2.4, -0.8, 1.6]])
    torch.testing.assert_close(features, want, rtol=1e-6, atol=1e-6)
