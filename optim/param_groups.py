"""Which parameters are hidden matrices (Muon and its relatives) and which are the rest (AdamW), by name and shape."""

from collections.abc import Iterable

from torch import Tensor

Named = list[tuple[str, Tensor]]

_HEADS = {"lm_head", "embed_out", "output", "head", "classifier", "score", "unembed"}
_EMBEDDINGS = {"wte", "wpe"}


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether a rule for hidden matrices should have this parameter.

    Yes for tensors of two or more dimensions, LoRA's A and B among them; no for embeddings (also LoRA on embeddings),
    output heads, norms, biases, and any vector or scalar. A head is recognised by the module that owns the weight
    (``lm_head``, ``output``, ``score``, ...). Convolutions count as matrices, the first of a network too: name it
    apart if it should not.
    """
    if param.ndim < 2:
        return False
    parts = name.lower().split(".")
    if "lora_a" in parts or "lora_b" in parts:
        return True
    if any("embed" in part or "norm" in part or part in _EMBEDDINGS for part in parts):
        return False
    owner = parts[-2] if len(parts) > 1 else parts[-1]
    return parts[-1] != "bias" and owner not in _HEADS


def split_matrices(named_parameters: Iterable[tuple[str, Tensor]]) -> tuple[Named, Named]:
    """(hidden matrices, rest), each in the given order; see `is_matrix`.

    Raises: TypeError if the parameters have no names, for the split needs them.
    """
    matrices: Named = []
    rest: Named = []
    for entry in named_parameters:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise TypeError("splitting matrices from the rest needs names: pass model.named_parameters()")
        (matrices if is_matrix(*entry) else rest).append(entry)
    return matrices, rest
