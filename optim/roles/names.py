"""The parts of a parameter's name, and what its words say about biases, norms, heads and embeddings."""

import re
from dataclasses import dataclass

from torch import Tensor

from optim.saved import bare_name

# these match single components of a dotted name, in lower case
_HEAD = re.compile(
    r"^(cls|qa_outputs|vocab_\w+|lm_loss|output_(layer|projection))$"
    r"|(^|_)(head|classifier|pooler|score|predictions|pred_layer)$"
)
_HEAD_ANYWHERE = re.compile(r"^(lm_head|head|embed_out|unembed\w*)$")  # as a layer's own name, also in numbered layers
_EMBEDDING = re.compile(
    r"(embed|embeds|embedding|embeddings|embedder|emb|embeds_layers?)(_?\d+)?$|^embed_(?!out|proj)|^w[tp]e$|^shared$"
    r"|(^|_)(tokens?|tables?|codebooks?)$"
)
_INPUT_LAYER = re.compile(r"^(proj|projection|linear|conv|convolution|(input|patch)_proj(ection)?)$")
_BIAS_TABLE = re.compile(r"(^|_)bias(es)?(_values)?$")
_NOT_EMBEDDING = re.compile(r"^relative_pos_embeddings$")  # a linear layer of ProphetNet
_NORM_WORD = re.compile(r"norms?$|^(ln|bn|gn)$")
PEFT = re.compile(r"^(lora|hada|lokr|ia3|vera|oft|boft|trainable_tokens)_\w+$")  # before the name of an adapter
ADAPTER = re.compile(r"^lora_[ab]$|^(hada|lokr)_[wt]\d?(_[ab])?$")  # adapters that are matrices
WEIGHT = {"weight", "weights", "weight_v"}  # "weight_v" of a weight norm is the matrix before scaling
_BIAS = re.compile(r"bias(es)?$|^(bias|b)$|(^|_)bias_\w$")


def components(name: str) -> list[str]:
    """Return the parts of a dotted name in lower case, without those that wrappers, peft and parametrizations add.

    Args:
        name: The name of a parameter.

    Returns:
        The parts.
    """
    parts = bare_name(name).lower().split(".")
    while len(parts) > 1 and parts[-1].isdigit():  # of a ParameterList
        parts.pop()
    if len(parts) > 3 and parts[-3] == "parametrizations":  # weight norm: a magnitude and a direction
        parts[-3:] = ["weight_g" if parts[-1] == "original0" else parts[-2]]
    kept: list[str] = []
    for part, before in zip(parts, ["", *parts], strict=False):
        of_adapter = before == "modules_to_save" or (bool(PEFT.search(before)) and part not in WEIGHT)
        if not of_adapter and part not in ("base_layer", "original_module", "modules_to_save"):
            kept.append(part)
    return kept


def words_of(part: str) -> list[str]:
    """Return the words of a part of a name, which are separated by underscores and digits.

    Args:
        part: A part of a dotted name.

    Returns:
        The words.
    """
    return [word for word in re.split(r"[_\d]+", part) if word]


@dataclass(frozen=True)
class Name:
    """The name of a parameter as its parts.

    Args:
        parts: The parts of the dotted name in lower case, as `components` returns them.
    """

    parts: list[str]

    @property
    def leaf(self) -> str:
        """The last part."""
        return self.parts[-1]

    @property
    def raw(self) -> bool:
        """Whether the parameter has its own name, and is not the weight or bias of a layer."""
        return self.leaf not in WEIGHT and self.leaf not in ("bias", "weight_g")

    @property
    def at(self) -> int:
        """The index in `parts` of the layer's name, or of the parameter's own; -1 if there is none (``0.weight``)."""
        if self.raw:
            return len(self.parts) - 1
        places = [i for i, part in enumerate(self.parts[:-1]) if not part.isdigit()]
        return places[-1] if places else -1

    @property
    def own(self) -> str:
        """The layer's name, or the parameter's own."""
        return self.parts[self.at] if self.at >= 0 else ""

    @property
    def inside(self) -> bool:
        """Whether the layer is one of a numbered sequence: a number precedes its name."""
        return any(part.isdigit() for part in self.parts[: max(self.at, 0)])

    @property
    def parent(self) -> str:
        """The name of the module that contains the layer, ignoring numbers."""
        return next((part for part in reversed(self.parts[: max(self.at, 0)]) if not part.isdigit()), "")

    @property
    def is_bias(self) -> bool:
        """Whether the parameter is a bias."""
        return bool(_BIAS.search(self.leaf))

    def is_norm(self, ndim: int) -> bool:
        """Return whether the parameter belongs to a norm.

        For a vector, any word of its layer's name may indicate a norm; for other tensors, only the last word, because
        `norm_proj` is a linear map.

        Args:
            ndim: The number of dimensions of the parameter.

        Returns:
            True if it belongs to a norm.
        """
        words = words_of(self.own)
        return any(_NORM_WORD.search(word) for word in (words if ndim < 2 else words[-1:]))

    @property
    def is_head(self) -> bool:
        """Whether the parameter belongs to a head, which follows the last layer."""
        if _HEAD_ANYWHERE.search(self.own):
            return True
        if self.inside:
            return False
        last = None if self.raw else -1
        of_head = any(_HEAD.search(part) for part in self.parts[:last])
        return of_head or (not self.raw and self.own in ("output", "decoder"))

    @property
    def is_embedding(self) -> bool:
        """Whether the parameter belongs to an embedding or a position table."""
        if _NOT_EMBEDDING.search(self.own):
            return False
        if _EMBEDDING.search(self.own) or (not self.raw and _BIAS_TABLE.search(self.own)):
            return True
        if self.inside or self.raw:
            return False
        patches = bool(_EMBEDDING.search(self.parent)) and bool(_INPUT_LAYER.search(self.own))
        return patches or self.own == "w"  # "w" is used by CTRL


def name_of(name: str) -> Name:
    """Return the parts of a parameter's name.

    Args:
        name: The name.

    Returns:
        The name as its parts.
    """
    return Name(components(name))


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias, by its name.

    Args:
        name: The name of the parameter.

    Returns:
        True for a bias.
    """
    return name_of(name).is_bias


def is_norm_or_bias(name: str, param: Tensor) -> bool:
    """Return whether a parameter belongs to a norm or is a bias, by its name.

    Args:
        name: The name of the parameter.
        param: The parameter, of any shape.

    Returns:
        True if it does.
    """
    it = name_of(name)
    return it.is_bias or it.is_norm(param.ndim)
