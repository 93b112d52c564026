"""Which matrices one tensor contains: query, key and value, or gate and up of a feed-forward layer."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from optim.roles.names import ADAPTER, name_of
from optim.saved import bare_name

Parts = tuple[tuple[int, ...], int]
"""The numbers of rows of the parts, and how often this pattern is repeated along the rows."""

_QKV = re.compile(r"^(c_attn|qkv(_proj)?|wqkv|query_key_value|in_proj_weight)$")
_GATE_UP = re.compile(r"^(gate_up_proj|up_gate_proj|gate_up|gateup_proj|input_linear|wi|w13|dense_h_to_4h)$")
_OUT = ("o_proj", "c_proj", "out_proj", "proj", "projection", "wo", "dense")
_DOWN = ("down_proj", "wo", "w2", "output_linear", "dense_4h_to_h")


def _count(holder: Any, *names: str) -> int:
    """Return the first of these numbers that a module or its configuration has; 0 if there is none."""
    for owner in (holder, getattr(holder, "config", None)):
        for name in names:
            if isinstance(found := getattr(owner, name, None), int) and not isinstance(found, bool):
                return found
    return 0


def _heads(holder: nn.Module) -> int:
    return _count(holder, "num_heads", "num_attention_heads", "n_head")


def _by_head(holder: nn.Module, rows: int) -> Parts | None:
    heads = _heads(holder)
    return ((rows // (3 * heads),) * 3, heads) if heads and rows % (3 * heads) == 0 else None


def _falcon(holder: nn.Module, rows: int) -> Parts | None:
    grouped = getattr(holder, "new_decoder_architecture", False)
    if not grouped and not getattr(holder, "multi_query", False):
        return _by_head(holder, rows)
    heads, keys = _heads(holder), _count(holder, "num_kv_heads") if grouped else 1
    if not heads or not keys or heads % keys or rows % (heads + 2 * keys):
        return None
    dim = rows // (heads + 2 * keys)
    return (heads // keys * dim, dim, dim), keys


def _bigcode(holder: nn.Module, rows: int) -> Parts | None:
    if not getattr(holder, "multi_query", False):
        return _by_head(holder, rows)
    heads = _heads(holder)
    dim = rows // (heads + 2) if heads else 0
    return ((heads * dim, dim, dim), 1) if dim and rows == (heads + 2) * dim else None


_INTERLEAVED: dict[str, Callable[[nn.Module, int], Parts | None]] = {
    "GPTNeoXAttention": _by_head,
    "GPTNeoXJapaneseAttention": _by_head,
    "BloomAttention": _by_head,
    "PersimmonAttention": _by_head,
    "MiniMaxLightningAttention": _by_head,
    "FalconAttention": _falcon,
    "FalconFlashAttention2": _falcon,
    "GPTBigCodeAttention": _bigcode,
    "CodeGenAttention": lambda _, rows: ((rows // 12,) * 3, 4) if rows % 12 == 0 else None,
    "GptOssExperts": lambda _, rows: ((1, 1), rows // 2),
}
"""Modules of transformers that do not have their parts one after the other -> their parts, of so many rows."""


def looks_fused(name: str) -> bool:
    """Return whether the name of a parameter is one that fused matrices have.

    Args:
        name: The name.

    Returns:
        True for names such as ``h.0.attn.c_attn.weight`` and ``mlp.gate_up_proj.weight``.
    """
    it = name_of(name)
    return not any(ADAPTER.search(part) for part in it.parts) and bool(_QKV.search(it.own) or _GATE_UP.search(it.own))


def fused(
    name: str,
    shape: tuple[int, int],
    inputs: Mapping[str, int],
    holder: nn.Module | None = None,
    *,
    biased: bool = False,
) -> Parts | None:
    """Return the parts of a fused matrix, if its name, its neighbours or its module show them.

    Args:
        name: The name of the parameter.
        shape: The numbers of outputs and inputs of its matrix, or of each of its matrices.
        inputs: The number of inputs of each matrix of the model, by `key_of` its name.
        holder: The module that computes with the parameter, if it is known: the attention, or the experts.
        biased: Whether the experts in the tensor have biases.

    Returns:
        The parts, or None for a matrix that is not fused, or whose parts are not known.

    Example:
        >>> from optim.roles.fused import fused
        >>> inputs = {"attn.qkv_proj": 8, "attn.o_proj": 8}  # 4 query heads of size 2, and 1 key head
        >>> fused("attn.qkv_proj.weight", (12, 8), inputs)
        ((8, 2, 2), 1)
    """
    if not looks_fused(name):
        return None
    rows, columns = shape
    if (known := _INTERLEAVED.get(type(holder).__name__)) is not None and holder is not None:
        return known(holder, rows)
    own = name_of(name).own
    prefix = key_of(name).removesuffix(own)

    def reads(*others: str) -> int | None:
        return next((inputs[prefix + other] for other in others if prefix + other in inputs), None)

    if _GATE_UP.search(own):
        unknown = biased and holder is None  # GPT-OSS has rows of gate and up in turn, and other models do not
        return ((rows // 2, rows // 2), 1) if rows == 2 * (reads(*_DOWN) or 0) and not unknown else None
    if own == "query_key_value" or (own == "wqkv" and "Wqkv" not in name):
        return None  # by head in some models, one after the other in others
    if own == "qkv_proj" and holder is None and reads("o_proj") is None:
        return None  # those of CodeGen and MiniMax are by head
    if own == "c_attn" and prefix + "q_attn" in inputs:  # of cross-attention, without queries
        return ((rows // 2, rows // 2), 1) if rows % 2 == 0 else None
    queries = reads(*_OUT) or (columns if rows == 3 * columns else rows)
    others = rows - queries
    return ((queries, others // 2, others // 2), 1) if 0 < others <= 2 * queries and others % 2 == 0 else None


def key_of(name: str) -> str:
    """Return a parameter's name in lower case, without wrappers and without ``.weight``.

    Args:
        name: The name.

    Returns:
        The key.
    """
    return bare_name(name).lower().removesuffix(".weight")
