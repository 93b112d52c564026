"""What kind a parameter is, by its name and shape, and by its module if that is known."""

import re
from typing import Literal, TypeAlias

from torch import Tensor, nn

from optim.roles.names import (
    ADAPTER,
    PEFT,
    name_of,
    words_of,
)

Kind: TypeAlias = Literal["matrix", "embedding", "head", "adapter of an embedding", "other"]

_TABLE_OR_GAIN = {  # words in the name of a parameter that is not the weight of a layer and not a linear map
    "a_log", "alpha", "ape", "beta", "const", "d", "decay", "emb", "embed", "embedding", "embeddings", "embeds", "enc",
    "encoding", "extensor", "faaaa", "freq", "freqs", "gain", "gamma", "lambda", "latent", "latents", "level", "log",
    "maa", "mask", "memory", "mix", "norm", "offset", "pad", "pointer", "pos", "position", "positional", "positions",
    "probe", "prompt", "queries", "query", "scale", "scales", "seg", "shift", "sink", "sinks", "state", "static",
    "table", "temperature", "threshold", "time", "token", "tokens",
}  # fmt: skip
_TAPS_OR_TABLE = re.compile(r"conv|^rel(ative)?_(logits|bias|pos)|embed")  # modules that have one as a parameter


def is_matrix(name: str, param: Tensor) -> bool:
    """Return whether a rule for hidden matrices should step a parameter, judging only by its name and shape.

    Args:
        name: The name of the parameter.
        param: The parameter, of any shape.

    Returns:
        True for a hidden matrix.

    Example:
        >>> from optim import is_matrix
        >>> is_matrix("layers.0.mlp.up_proj.weight", torch.empty(8, 4)), is_matrix("lm_head.weight", torch.empty(8, 4))
        (True, False)
    """
    return kind_of(name, param) == "matrix"


def kind_of(name: str, param: Tensor, owner: nn.Module | None = None) -> Kind:
    """Return what a parameter is.

    Args:
        name: The name of the parameter.
        param: The parameter, of any shape.
        owner: The module that has the parameter, if it is known.

    Returns:
        The kind.
    """
    it, shape = name_of(name), tuple(param.shape)
    if param.ndim < 2 or (param.ndim > 2 and param.numel() == max(shape)):
        return "other"
    if any(part.startswith("lora_embedding_") for part in it.parts):
        return "adapter of an embedding"
    if any(ADAPTER.search(part) for part in it.parts):
        return "matrix"
    if PEFT.search(it.own):
        return "embedding" if it.own.startswith("trainable_tokens") else "other"
    if is_table(owner):
        return "embedding"
    if _is_linear(owner) and not it.raw:
        if it.is_head:
            return "head"
        return "embedding" if it.is_embedding and not it.inside else "matrix"
    if it.is_bias or it.leaf == "weight_g" or it.is_norm(param.ndim) or "norm" in type(owner).__name__.lower():
        return "other"
    if it.is_head:
        return "head"
    if it.raw:
        words = {*words_of(it.leaf), it.leaf}
        if it.is_embedding and param.ndim == 2:
            return "embedding"
        if words & _TABLE_OR_GAIN or _TAPS_OR_TABLE.search(it.parent) or sum(side > 1 for side in shape) < 2:
            return "other"
        return "matrix"
    if it.is_embedding:
        return "embedding"
    depthwise = param.ndim > 2 and shape[1] == 1 and getattr(owner, "groups", 2) > 1
    return "other" if depthwise else "matrix"


def is_table(owner: nn.Module | None) -> bool:
    """Return whether a module is an embedding.

    Args:
        owner: The module, or None.

    Returns:
        True for an embedding.
    """
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag)


def _is_linear(owner: nn.Module | None) -> bool:
    return isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"
