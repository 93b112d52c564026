"""A tiny Llama and made-up rows, so that the examples run offline in seconds."""

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 100


def model(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A Llama of two layers with weights drawn from `seed`."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))


def rows(count: int, *, low: int = 3, high: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """int64 [count, 12]: rows of tokens between `low` and `high`."""
    return torch.randint(low, high, (count, 12), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte; other characters are spelled by theirs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
