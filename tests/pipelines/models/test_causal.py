"""Models that a padded batch would be wrong for are refused when they are opened."""

import pytest
import torch
import transformers

from datatools import DataError
from pipelines.models import causal
from tests.zoo import build as zoo


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MambaForCausalLM", "GPT2LMHeadModel", "Qwen2MoeForCausalLM",
                                  "Gemma3nForCausalLM", "BertLMHeadModel", "BltForCausalLM", "CTRLLMHeadModel",
                                  "GitForCausalLM"])  # fmt: skip
def test_causal_models_pass_and_keep_their_state(name):
    model = zoo.build(name).requires_grad_(False)
    causal.check(model, "m")
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name, why", [
    ("XLNetLMHeadModel", "not causal: the logits of a token change with the tokens after it"),
    ("CpmAntForCausalLM", "not causal"),
    ("BigBirdForCausalLM", "permanently replaces its attention .* set attention_type to original_full"),
    ("ProphetNetForCausalLM", "the number of tokens after it"),
    ("ReformerModelWithLMHead", "cannot be run and differentiated"),
])  # fmt: skip
def test_others_are_refused_by_name(name, why):
    with pytest.raises(DataError, match=f"--model m: {name}.*{why}"):
        causal.check(zoo.build(name), "m")


def test_an_encoder_is_told_which_setting_makes_it_a_decoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=8, is_decoder=False)  # fmt: skip
        model = transformers.BertLMHeadModel(config).eval()
    with pytest.raises(DataError, match="BertLMHeadModel is not causal.*set is_decoder to true"):
        causal.check(model, "m")
