"""A tiny Llama and made-up rows, so that the examples run offline in seconds."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 100


def model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers with weights drawn from `seed`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape))


def rows(count: int, *, low: int = 3, high: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """int64 [count, 12]: rows of tokens between `low` and `high`."""
    return torch.randint(low, high, (count, 12), generator=torch.Generator().manual_seed(seed))
