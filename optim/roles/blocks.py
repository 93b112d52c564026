"""Which block of a transformer a parameter belongs to, by its name."""

import re
from typing import Literal, TypeAlias, get_args

from optim.roles.names import name_of

Block: TypeAlias = Literal["embedding", "qk", "vo", "ffn", "norm", "head", "other"]
"""The blocks into which arXiv 2502.19002 (blockwise learning rates) divides the parameters of a transformer, and
"other" for everything else: state-space and convolution weights, attention sinks, and uninformative names."""

BLOCKS: tuple[Block, ...] = get_args(Block)

_FFN = re.compile(
    r"mlp|feed_?forward|ffn|moe|expert|intermediate|densereludense|^(ff|fc\d|c_fc|wi(_\d)?|dense_.*h"
    r"|(gate|up|down|gate_up)_proj)$"
)
_QK = re.compile(r"^(w?[qk](_[ab])?|[qk](_[ab])?_proj|[qk]_(attn|lin)|(query|key)(_proj)?|project_[qk])$")
_VO = re.compile(r"^(w?[vo]|[vo](_[ab])?_proj|[vo]_(attn|lin)|value(_proj)?|project_v|attention_out|out_lin|out_proj)$")
_FUSED_QKV = re.compile(r"^(c_attn|qkv\w*|w_?qkv|query_key_value|in_proj(_\w+)?|kv_\w+)$")
_ATTENTION = re.compile(r"attn|attention")


def block_of(name: str) -> Block:
    """Return the block of a transformer that a parameter belongs to by its name; a bias is in the block of its module.

    The function recognises the names of Llama (Hugging Face's and Meta's), Mistral, Mixtral, Qwen, Phi, Gemma, GPT-2
    (also with separate query and key), GPT-NeoX, GPT-OSS, T5, BART, Whisper, BERT, ModernBERT, RoBERTa and DistilBERT,
    LoRA's matrices on any of them, and wrapper prefixes. Norms are "norm" in every layer. Query, key and value in one
    matrix (`c_attn`, `qkv_proj`, `query_key_value`) are "vo", the safer of the two choices, with a lower learning rate
    and a finer second moment. Poolers and classifiers are "head". Everything else is "other".

    Args:
        name: The name of the parameter.

    Returns:
        The block.

    Example:
        >>> from optim import block_of
        >>> block_of("model.layers.0.self_attn.q_proj.weight"), block_of("model.layers.0.mlp.up_proj.weight")
        ('qk', 'ffn')
    """
    it = name_of(name)
    if it.is_norm(1):
        return "norm"
    if it.is_head:
        return "head"
    if it.is_embedding or any(part.startswith(("lora_embedding_", "trainable_tokens_")) for part in it.parts):
        return "embedding"

    parts = [*it.parts[:-1], re.sub(r"_(weight|bias)$", "", it.leaf)]

    def has(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(part) for part in parts)

    in_attention = has(_ATTENTION)
    if has(_FFN):
        return "ffn"
    if has(_QK):
        return "qk"
    if has(_VO) or has(_FUSED_QKV) or (in_attention and {"c_proj", "dense", "proj"} & set(parts)):
        return "vo"
    if "output" in parts and not in_attention:  # BERT's second matrix
        return "ffn"
    return "other"
