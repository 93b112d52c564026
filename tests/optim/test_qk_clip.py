"""QK-clip: what it records are the logits, and afterwards none exceeds the threshold."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from optim import QKClip, create


def llama(key_heads, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_heads, attn_implementation="sdpa", attention_bias=True, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40 * torch.arange(1, 33).view(32, 1) / 32)  # heads of several sizes
            layer.self_attn.k_proj.weight.mul_(40)
    return model


FUSED = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
IDS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("key_heads", [4, 2])
def test_no_logit_of_the_first_layer_exceeds_the_threshold(key_heads):
    model = llama(key_heads)
    attention = model.model.layers[0].self_attn
    with QKClip(model, threshold=1.0) as clip:
        model(IDS)
        before = clip.largest[attention]
        untouched = attention.v_proj.weight.clone()
        assert 0 < clip.clip() <= 8 and not clip.largest
        model(IDS)
        after = clip.largest[attention]
    assert float(before.max()) > 1.5
    torch.testing.assert_close(after, before.clamp(max=1.0), rtol=1e-4, atol=1e-5)
    assert torch.equal(attention.v_proj.weight, untouched)
    model(IDS)
    assert torch.equal(clip.largest[attention], after), "removed: it records nothing"


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=16)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**FUSED)),
        lambda: Phi3ForCausalLM(Phi3Config(**FUSED, num_key_value_heads=2, pad_token_id=0)),
    ],
)
def test_queries_and_keys_of_fused_layers_are_scaled(model):
    """Conv1D with outputs last, heads in turn, and fewer key heads; values stay."""
    torch.manual_seed(0)
    model = model().eval()  # GPT-2 has dropout
    with QKClip(model, threshold=1e-3) as clip:
        attention, (queries, keys) = next(iter(clip._weights.items()))
        weight = queries.layer.weight
        before = weight.detach().clone()
        model(IDS)
        largest = clip.largest[attention]
        assert clip.clip() == 8
        model(IDS)
        torch.testing.assert_close(clip.largest[attention], largest.clamp(max=1e-3), rtol=1e-3, atol=1e-6)
    changed = (weight != before).float().mean()
    assert float(changed) == pytest.approx(queries.rows / 64 if keys.rows == 16 else 2 / 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_padding_and_checkpoints_do_not_change_what_is_scaled(reentrant):
    """With a mask transformers repeats keys, whose layer has fewer heads all the same."""
    model = llama(2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    attention = model.model.layers[0].self_attn
    keys = attention.k_proj.weight.detach().clone()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with QKClip(model, threshold=1.0) as clip:
        for _ in range(2):
            model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=mask).logits.sum().backward()
            largest = clip.largest[attention]
            clip.clip()
    assert float(largest.max()) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(attention.k_proj.weight, keys)


def test_layers_of_other_sizes_are_refused():
    model = llama(4)
    attention = model.model.layers[1].self_attn
    with QKClip(model) as clip:
        q = torch.zeros(1, 4, 3, 4)
        with pytest.raises(
            ValueError, match=r"4 query heads of size 4, but model\.layers\.1\.self_attn\.q_proj has 32"
        ):
            clip.record(attention, q, q, None, False, 1.0)


def test_what_is_recorded_are_the_logits_without_masked_ones():
    q, k = (torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
    model = llama(4)
    module = model.model.layers[0].self_attn
    logits = 0.5 * q @ k.mT
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    for mask, causal in ((None, True), (visible, False), (torch.zeros(7, 7).masked_fill(~visible, -1e9), False)):
        clip = QKClip(model)
        clip.record(module, q, k, mask, causal, 0.5)
        torch.testing.assert_close(clip.largest[module], logits.masked_fill(~visible, -1e9).amax((0, 2, 3)))


def test_it_trains_beside_an_optimizer_and_says_what_is_missing():
    model = llama(2)
    optimizer = create("muon", model, lr=1e-3)
    clip = QKClip(model, threshold=2.0)
    with pytest.raises(RuntimeError, match="attn_implementation='sdpa'"):
        clip.clip()
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        clip.clip()
        optimizer.zero_grad()
    with torch.no_grad():
        model(IDS)
    assert not clip.largest, "an evaluation records nothing"
    with pytest.raises(ValueError, match="no module of the model has layers 'q' and 'k'"):
        QKClip(model, names=("q", "k"))
    with pytest.raises(ValueError, match="threshold = 0"):
        QKClip(model, threshold=0)


@pytest.mark.parametrize(
    "name", ["q_norm", "q_layernorm", "q_layer_norm", "query_layernorm", "qk_norm", "ln_q", "norm_query", "q_ln"]
)
def test_normalised_queries_are_refused_under_the_names_of_every_model(name):
    model = llama(4)
    attention = model.model.layers[0].self_attn
    setattr(attention, name, torch.nn.LayerNorm(8))
    with pytest.raises(ValueError, match=rf"layers\.0\.self_attn normalises its queries \({name}\)"):
        QKClip(model)
    setattr(attention, name, torch.nn.Identity())
    attention.q_a_layernorm = torch.nn.LayerNorm(8)  # of the latents that queries are made of
    QKClip(model).remove()


def test_copies_of_a_model_are_scaled_alike_and_adapters_are_refused(monkeypatch):
    model = llama(4)
    clip = QKClip(model, threshold=2.0)
    model(IDS)
    elsewhere = 100 * max(float(largest.max()) for largest in clip.largest.values())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op, group: x.fill_(elsewhere))
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    assert clip.clip() == 8
    after = model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(after.detach(), before * (2.0 / elsewhere) ** 0.5)
    attention = model.model.layers[1].self_attn
    clip.remove()
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj is a Sequential without a floating-point weight"
    ):
        QKClip(model)
    assert not model.model.layers[0].self_attn._forward_hooks, "nothing is left of it"
