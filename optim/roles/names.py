"""A parameter's name, taken apart: what its words say of a bias, a norm, a head or an embedding."""

import re
from dataclasses import dataclass

from torch import Tensor

from optim.saved import bare_name

# of single components of a dotted name, in lower case
_HEAD = re.compile(
    r"^(cls|qa_outputs|vocab_\w+|lm_loss|output_(layer|projection))$"
    r"|(^|_)(head|classifier|pooler|score|predictions|pred_layer)$"
)
_HEAD_ANYWHERE = re.compile(r"^(lm_head|head|embed_out|unembed\w*)$")  # as the layer's own name, in a layer of many too
_EMBEDDING = re.compile(
    r"(embed|embeds|embedding|embeddings|embedder|emb|embeds_layers?)(_?\d+)?$|^embed_(?!out|proj)|^w[tp]e$|^shared$"
    r"|(^|_)(tokens?|tables?|codebooks?)$"
)
_INPUT_LAYER = re.compile(r"^(proj|projection|linear|conv|convolution|(input|patch)_proj(ection)?)$")
_BIAS_TABLE = re.compile(r"(^|_)bias(es)?(_values)?$")
_NOT_EMBEDDING = re.compile(r"^relative_pos_embeddings$")  # ProphetNet's, a linear layer
_NORM_WORD = re.compile(r"norms?$|^(ln|bn|gn)$")
PEFT = re.compile(r"^(lora|hada|lokr|ia3|vera|oft|boft|trainable_tokens)_\w+$")  # before the name of an adapter
ADAPTER = re.compile(r"^lora_[ab]$|^(hada|lokr)_[wt]\d?(_[ab])?$")  # those that are matrices
WEIGHT = {"weight", "weights", "weight_v"}  # and "weight_v" of a weight norm, the matrix before it is scaled
_BIAS = re.compile(r"bias(es)?$|^(bias|b)$|(^|_)bias_\w$")


def components(name: str) -> list[str]:
    """The parts of a dotted name in lower case, without what wrappers, peft and parametrizations put in between."""
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
    """The words of a part of a name: what underscores and digits separate."""
    return [word for word in re.split(r"[_\d]+", part) if word]


@dataclass(frozen=True)
class Name:
    """A parameter's name, taken apart."""

    parts: list[str]

    @property
    def leaf(self) -> str:
        """The last part."""
        return self.parts[-1]

    @property
    def raw(self) -> bool:
        """Not the weight or bias of a layer, but a parameter that has its own name."""
        return self.leaf not in WEIGHT and self.leaf not in ("bias", "weight_g")

    @property
    def at(self) -> int:
        """Where the layer's name stands in `parts`, or the parameter's own; -1 where there is none (``0.weight``)."""
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
        """In a layer of many: a number stands before the name of the own layer."""
        return any(part.isdigit() for part in self.parts[: max(self.at, 0)])

    @property
    def parent(self) -> str:
        """The name of what the layer is in, numbers aside."""
        return next((part for part in reversed(self.parts[: max(self.at, 0)]) if not part.isdigit()), "")

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias's."""
        return bool(_BIAS.search(self.leaf))

    def is_norm(self, ndim: int) -> bool:
        """Whether it is a norm's, of a tensor of `ndim` dimensions.

        Any word of its layer's name may say so of a vector, the last one of a tensor: `norm_proj` maps.
        """
        words = words_of(self.own)
        return any(_NORM_WORD.search(word) for word in (words if ndim < 2 else words[-1:]))

    @property
    def is_head(self) -> bool:
        """Whether it is that of a head: what comes after the last layer."""
        if _HEAD_ANYWHERE.search(self.own):
            return True
        if self.inside:
            return False
        last = None if self.raw else -1
        of_head = any(_HEAD.search(part) for part in self.parts[:last])
        return of_head or (not self.raw and self.own in ("output", "decoder"))

    @property
    def is_embedding(self) -> bool:
        """Whether it is that of an embedding or of a position table."""
        if _NOT_EMBEDDING.search(self.own):
            return False
        if _EMBEDDING.search(self.own) or (not self.raw and _BIAS_TABLE.search(self.own)):
            return True
        if self.inside or self.raw:
            return False
        patches = bool(_EMBEDDING.search(self.parent)) and bool(_INPUT_LAYER.search(self.own))
        return patches or self.own == "w"  # the latter is CTRL's


def name_of(name: str) -> Name:
    """The name of a parameter, taken apart."""
    return Name(components(name))


def is_bias(name: str) -> bool:
    """Whether the parameter is a bias, by its name."""
    return name_of(name).is_bias


def is_norm_or_bias(name: str, param: Tensor) -> bool:
    """Whether the parameter is a norm's, or a bias, by its name."""
    it = name_of(name)
    return it.is_bias or it.is_norm(param.ndim)
