"""A tiny Llama and a byte tokenizer with a ChatML template: real code paths, no download, milliseconds."""

import json
from pathlib import Path

import torch

TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tiny_model(folder: Path, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """A 2-layer Llama with random weights and a byte-level tokenizer, saved as transformers saves one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *, source: str = "a", start: int = 0, answer: str = "answer") -> Path:
    """`count` distinct message rows of varying length."""
    lines = []
    for i in range(start, start + count):
        messages = [
            {"role": "user", "content": f"question {i} " + "x" * (i % 7)},
            {"role": "assistant", "content": f"{answer} {i * i % 97}" + "y" * (i % 5)},
        ]
        lines.append(json.dumps({"dataset": f"{source}{i % 3}", "id": f"{source}-{i}", "messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path
