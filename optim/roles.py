"""What each parameter is: a hidden matrix and how it lies in memory, an embedding, a head, or none of these.

Told by names and shapes, or, where the model itself is given, by the types of its modules as well.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn

from optim.saved import bare_name

Named: TypeAlias = list[tuple[str, Tensor]]
Kind: TypeAlias = Literal["matrix", "embedding", "head", "adapter of an embedding", "other"]
Block: TypeAlias = Literal["embedding", "qk", "vo", "ffn", "norm", "head", "other"]
"""The kinds of parameters that a transformer has, as arXiv 2502.19002 (blockwise learning rates) divides them, and
"other", what is none of them: state-space and convolution weights, attention sinks, names that tell nothing."""

BLOCKS: tuple[Block, ...] = get_args(Block)


@dataclass(frozen=True)
class Role:
    """What a parameter is, and the fields of `MatrixRule` that say how its matrices lie, where it is a matrix."""

    kind: Kind
    layout: Mapping[str, Any] = field(default_factory=dict)


def roles(named_parameters: Iterable[tuple[str, Tensor]], model: nn.Module | None = None) -> dict[str, Role]:
    """name -> what the parameter is.

    A matrix is the weight of a linear map between features: of a linear layer, a router, a convolution over channels,
    LoRA's A and B (on a head too), and each expert of a mixture, also where one tensor holds all of them. No matrices
    are embeddings and position tables, what is behind the last layer (heads, poolers, classifiers), norms, biases (an
    expert's, [experts, outputs], too), depthwise convolutions, time mixes, `A_log`, sinks, and what else is a vector.
    Without the model, names and shapes decide; a name that tells nothing is told by its shape.

    The layout, as in `MatrixRule`: "transposed" where inputs come first: GPT-2's Conv1D, told by its biases or its
    wider matrices; experts as in GPT-OSS and Llama 4. "batched" where one tensor is a stack of matrices. The side of an
    expert's outputs is told by the pair of its matrices, of which one maps to what the other maps from, by its biases,
    or by the width of the model; outputs come first where none of these tells.
    """
    named = list(named_parameters)
    modules = dict(model.named_modules()) if model is not None else {}
    heads = {id(head) for head in (_output_embeddings(model),) if head is not None}
    owners = {name: _owner(name, modules) for name, _ in named}
    kinds: dict[str, Kind] = {}
    for name, param in named:
        owner = owners[name]
        of_head = id(owner) in heads and param.ndim > 1 and not _is_table(owner)
        kinds[name] = "head" if of_head else kind_of(name, param, owner)
    found = layouts([entry for entry in named if kinds[entry[0]] == "matrix"], named, owners)
    return {name: Role(kinds[name], found.get(name, {})) for name, _ in named}


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether a rule for hidden matrices should have this parameter, by its name and shape alone; see `roles`."""
    return kind_of(name, param) == "matrix"


# ------------------------------------------------------------------------------------------------------------- names

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
_PEFT = re.compile(r"^(lora|hada|lokr|ia3|vera|oft|boft|trainable_tokens)_\w+$")  # before the name of an adapter
_ADAPTER = re.compile(r"^lora_[ab]$|^(hada|lokr)_[wt]\d?(_[ab])?$")  # those that are matrices
_TABLE_OR_GAIN = {  # words in the name of a parameter that belongs to no linear layer of its own, and maps nothing
    "a_log", "alpha", "ape", "beta", "const", "d", "decay", "emb", "embed", "embedding", "embeddings", "embeds", "enc",
    "encoding", "extensor", "faaaa", "freq", "freqs", "gain", "gamma", "lambda", "latent", "latents", "level", "log",
    "maa", "mask", "memory", "mix", "norm", "offset", "pad", "pointer", "pos", "position", "positional", "positions",
    "probe", "prompt", "queries", "query", "scale", "scales", "seg", "shift", "sink", "sinks", "state", "static",
    "table", "temperature", "threshold", "time", "token", "tokens",
}  # fmt: skip
_TAPS_OR_TABLE = re.compile(r"conv|^rel(ative)?_(logits|bias|pos)|embed")  # modules that keep one as a parameter
_WEIGHT = {"weight", "weights", "weight_v"}  # and "weight_v" of a weight norm, the matrix before it is scaled
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
        of_adapter = before == "modules_to_save" or (bool(_PEFT.search(before)) and part not in _WEIGHT)
        if not of_adapter and part not in ("base_layer", "original_module", "modules_to_save"):
            kept.append(part)
    return kept


def _words(part: str) -> list[str]:
    return [word for word in re.split(r"[_\d]+", part) if word]


@dataclass(frozen=True)
class _Name:
    """A parameter's name, taken apart."""

    parts: list[str]

    @property
    def leaf(self) -> str:
        return self.parts[-1]

    @property
    def raw(self) -> bool:
        """Not the weight or bias of a layer, but a parameter that has its own name."""
        return self.leaf not in _WEIGHT and self.leaf not in ("bias", "weight_g")

    @property
    def at(self) -> int:
        """Where the layer's name stands in `parts`, or the parameter's own; -1 where there is none (``0.weight``)."""
        if self.raw:
            return len(self.parts) - 1
        places = [i for i, part in enumerate(self.parts[:-1]) if not part.isdigit()]
        return places[-1] if places else -1

    @property
    def own(self) -> str:
        return self.parts[self.at] if self.at >= 0 else ""

    @property
    def inside(self) -> bool:
        """In a layer of many: a number stands before the name of the own layer."""
        return any(part.isdigit() for part in self.parts[: max(self.at, 0)])

    @property
    def parent(self) -> str:
        return next((part for part in reversed(self.parts[: max(self.at, 0)]) if not part.isdigit()), "")


def _name(name: str) -> _Name:
    return _Name(components(name))


def is_bias(name: str) -> bool:
    """Whether the parameter is a bias, by its name."""
    return _is_bias(_name(name))


def is_norm_or_bias(name: str, param: Tensor) -> bool:
    """Whether the parameter is a norm's, or a bias, by its name."""
    it = _name(name)
    return _is_bias(it) or _is_norm(it, param.ndim)


def _is_bias(name: _Name) -> bool:
    return bool(_BIAS.search(name.leaf))


def _is_norm(name: _Name, ndim: int) -> bool:
    """Any word of its layer's name may say so of a vector, the last one of a tensor: `norm_proj` maps."""
    words = _words(name.own)
    return any(_NORM_WORD.search(word) for word in (words if ndim < 2 else words[-1:]))


def _is_head(name: _Name) -> bool:
    if _HEAD_ANYWHERE.search(name.own):
        return True
    if name.inside:
        return False
    last = None if name.raw else -1
    return any(_HEAD.search(part) for part in name.parts[:last]) or (not name.raw and name.own in ("output", "decoder"))


def _is_embedding(name: _Name) -> bool:
    if _NOT_EMBEDDING.search(name.own):
        return False
    if _EMBEDDING.search(name.own) or (not name.raw and _BIAS_TABLE.search(name.own)):
        return True
    if name.inside or name.raw:
        return False
    patches = bool(_EMBEDDING.search(name.parent)) and bool(_INPUT_LAYER.search(name.own))
    return patches or name.own == "w"  # the latter is CTRL's


def kind_of(name: str, param: Tensor, owner: nn.Module | None = None) -> Kind:
    """What a parameter is, by its name and shape, and by the module that owns it where that is known."""
    it, shape = _name(name), tuple(param.shape)
    if param.ndim < 2 or (param.ndim > 2 and param.numel() == max(shape)):
        return "other"
    if any(part.startswith("lora_embedding_") for part in it.parts):
        return "adapter of an embedding"
    if any(_ADAPTER.search(part) for part in it.parts):
        return "matrix"
    if _PEFT.search(it.own):
        return "embedding" if it.own.startswith("trainable_tokens") else "other"
    if _is_table(owner):
        return "embedding"
    if _is_linear(owner) and not it.raw:
        if _is_head(it):
            return "head"
        return "embedding" if _is_embedding(it) and not it.inside else "matrix"
    if _is_bias(it) or it.leaf == "weight_g" or _is_norm(it, param.ndim) or "norm" in type(owner).__name__.lower():
        return "other"
    if _is_head(it):
        return "head"
    if it.raw:
        words = {*_words(it.leaf), it.leaf}
        if _is_embedding(it) and param.ndim == 2:
            return "embedding"
        if words & _TABLE_OR_GAIN or _TAPS_OR_TABLE.search(it.parent) or sum(side > 1 for side in shape) < 2:
            return "other"
        return "matrix"
    if _is_embedding(it):
        return "embedding"
    depthwise = param.ndim > 2 and shape[1] == 1 and getattr(owner, "groups", 2) > 1
    return "other" if depthwise else "matrix"


def _is_table(owner: nn.Module | None) -> bool:
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag)


def _is_linear(owner: nn.Module | None) -> bool:
    return isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"


def _owner(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(name.rpartition(".")[0])


def _output_embeddings(model: nn.Module | None) -> nn.Module | None:
    ask = getattr(model, "get_output_embeddings", None)
    try:
        return ask() if ask is not None else None
    except (AttributeError, NotImplementedError):  # of models that have the method of a base class, and no head
        return None


# ----------------------------------------------------------------------------------------------------------- layouts

_CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}
_UP = re.compile(r"gate|up|^(w|fc|v)_?[13]$|^wi(_\d)?$|input|^c_fc$")
_DOWN = re.compile(r"down|^(w2|fc2)$|^wo|output|^c_proj$")
_FUSED = re.compile(r"gate_up|up_gate|gateup|^w13$|input_linear")
_ROUTER = {"router", "gate", "gating", "classifier", "wg"}
_STACK = re.compile(r"(proj|weight|linear)$")
# [inputs, heads, size], which flattens to [inputs, outputs]: XLNet's; [heads, inputs, outputs]: RecurrentGemma's
_INPUTS_FIRST = re.compile(r"rel_attn\.[qkvr]$|rg_lru\.(input|recurrent)_gate_weight$|mm_input_projection_weight$")


def layouts(
    matrices: Iterable[tuple[str, Tensor]],
    others: Iterable[tuple[str, Tensor]] = (),
    owners: Mapping[str, nn.Module | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """name -> how its matrices lie in memory, for those that are not [outputs, inputs]; see `roles`.

    others: parameters beside them that tell something: biases, routers, embeddings.
    """
    matrices = list(matrices)
    around = dict(others) | dict(matrices)
    routers = [(name, param) for name, param in around.items() if param.ndim == 2 and _is_router(_name(name))]
    owners = owners or {}
    found: dict[str, dict[str, Any]] = {}
    stacks: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)  # parent -> own name -> parameter
    flat: list[tuple[str, Tensor]] = []
    for name, param in matrices:
        it = _name(name)
        path = ".".join(it.parts[: it.at + 1])
        if _INPUTS_FIRST.search(path):
            batched = {"batched": True} if "rg_lru" in path else {}
            found[name] = {"transposed": True} | batched
        elif param.ndim == 3 and (_is_stack(it) or (it.raw and _beside(name, routers)[:1] == param.shape[:1])):
            stacks[path.rpartition(".")[0]][it.own] = name, param
        elif param.ndim == 2:
            flat.append((name, param))
    for of_one in stacks.values():
        for name, turned in _orientations(of_one, around, routers, owners).items():
            found[name] = {"batched": True} | ({"transposed": True} if turned else {})
    found |= _one_below_the_other(flat, routers, owners)
    found |= {name: {"transposed": True} for name in _conv1d(flat, around, owners)}
    return found


def _is_stack(name: _Name) -> bool:
    """Whether a tensor of three dimensions is a stack of matrices, and no convolution or matrix between heads."""
    if any("expert" in part or "moe" in part for part in name.parts[: name.at + 1]):
        return True
    return bool(_STACK.search(name.own)) and (name.raw or name.own.endswith("linear"))


def _orientations(
    stack: Mapping[str, tuple[str, Tensor]],
    around: Mapping[str, Tensor],
    routers: Named,
    owners: Mapping[str, nn.Module | None],
) -> dict[str, bool]:
    """name -> whether its matrices are [inputs, outputs], of the stacks of one mixture."""
    stated = {name: getattr(owners.get(name), "is_transposed", None) for name, _ in stack.values()}
    if all(isinstance(value, bool) for value in stated.values()):
        return {name: bool(value) for name, value in stated.items()}
    votes = {vote for own, entry in stack.items() if (vote := _by_bias(*entry, around)) is not None}
    for up, (_, first) in stack.items():
        for down, (_, second) in stack.items():
            if up != down and _UP.search(up) and _DOWN.search(down) and not _DOWN.search(up):
                (c, d), (a, b) = first.shape[1:], second.shape[1:]
                factors = (2,) if _FUSED.search(up) else (1, 2)
                straight = d == a and c in [k * b for k in factors]
                turned = c == b and d in [k * a for k in factors]
                if straight != turned:
                    votes.add(turned)
    if not votes:
        votes = {vote for own, entry in stack.items() if (vote := _by_width(own, *entry, around, routers)) is not None}
    return {name: votes == {True} for name, _ in stack.values()}


def _by_bias(name: str, param: Tensor, around: Mapping[str, Tensor]) -> bool | None:
    prefix = name.rpartition(".")[0]
    bias = around.get(f"{name}_bias", around.get(f"{prefix}.bias" if name.endswith(".weight") else ""))
    rows, columns = param.shape[-2:]
    if bias is None or bias.ndim == 0 or rows == columns:
        return None
    return {rows: False, columns: True}.get(bias.shape[-1])


def _by_width(own: str, name: str, param: Tensor, around: Mapping[str, Tensor], routers: Named) -> bool | None:
    beside = _beside(name, routers)
    width = beside[1] if beside else _width(around)
    rows, columns = param.shape[-2:]
    if width is None or (rows == width) == (columns == width):
        return None
    if _DOWN.search(own):
        return bool(columns == width)
    return bool(rows == width) if _UP.search(own) else None


def _is_router(name: _Name) -> bool:
    layers = name.parts[:-1]
    between = [part for part in layers if not part.isdigit()][-2:]  # `router.layer`, `gate.wg`, and plain `gate`
    return not _is_bias(name) and any(set(_words(part)) <= _ROUTER for part in between)


def _beside(name: str, routers: Named) -> tuple[int, ...]:
    """The shape [experts, width of the model] of the router nearest to a mixture's tensor, in its layer; or ()."""
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        for router, param in routers:
            if router.startswith(prefix + "."):
                return tuple(param.shape)
        if prefix.rpartition(".")[2].isdigit():
            break  # the next layer's is another's
    return ()


def _width(around: Mapping[str, Tensor]) -> int | None:
    widths = Counter(int(p.shape[1]) for n, p in around.items() if p.ndim == 2 and kind_of(n, p) == "embedding")
    return widths.most_common(1)[0][0] if widths else None


def _one_below_the_other(
    flat: Named, routers: Named, owners: Mapping[str, nn.Module | None]
) -> dict[str, dict[str, Any]]:
    """DBRX's experts: [experts x size, width], of which `w2` maps from its rows."""
    found: dict[str, dict[str, Any]] = {}
    for name, param in flat:
        it = _name(name)
        if not it.raw or it.leaf not in ("w1", "v1", "w2") or "experts" not in it.parts:
            continue
        count = getattr(owners.get(name), "moe_num_experts", None) or next(iter(_beside(name, routers)), 0)
        if count and count > 1 and param.shape[0] % count == 0:
            found[name] = {"batched": int(count)} | ({"transposed": True} if it.leaf == "w2" else {})
    return found


def _conv1d(flat: Named, around: Mapping[str, Tensor], owners: Mapping[str, nn.Module | None]) -> list[str]:
    """The weights [inputs, outputs] among those of layers: GPT-2's Conv1D, where others give its names to nn.Linear."""
    layers = [(name, _name(name), param) for name, param in flat if name.endswith(".weight")]
    layers = [(name, it, param) for name, it, param in layers if not any(_ADAPTER.search(p) for p in it.parts)]
    known = {name: type(owners[name]).__name__ == "Conv1D" for name, _, _ in layers if owners.get(name) is not None}
    votes: dict[str, set[bool]] = defaultdict(set)
    for name, it, param in layers:
        family = "conv1d" if it.own in _CONV1D else it.own
        rows, columns = param.shape
        bias = around.get(name.removesuffix("weight") + "bias")
        if rows == columns:
            continue
        if bias is not None and bias.numel() in (rows, columns):
            votes[family].add(bias.numel() == columns)
        elif it.own in ("c_attn", "c_fc"):
            votes[family].add(rows < columns)
        elif it.own == "c_proj" and it.parent == "mlp":
            votes[family].add(rows > columns)
    turned = {family for family, seen in votes.items() if seen == {True}}
    by_name = {name: ("conv1d" if it.own in _CONV1D else it.own) in turned for name, it, _ in layers}
    return [name for name, told in (by_name | known).items() if told]


# ------------------------------------------------------------------------------------------------------------ blocks

_FFN = re.compile(
    r"mlp|feed_?forward|ffn|moe|expert|intermediate|densereludense|^(ff|fc\d|c_fc|wi(_\d)?|dense_.*h"
    r"|(gate|up|down|gate_up)_proj)$"
)
_QK = re.compile(r"^(w?[qk](_[ab])?|[qk](_[ab])?_proj|[qk]_(attn|lin)|(query|key)(_proj)?|project_[qk])$")
_VO = re.compile(r"^(w?[vo]|[vo](_[ab])?_proj|[vo]_(attn|lin)|value(_proj)?|project_v|attention_out|out_lin|out_proj)$")
_FUSED_QKV = re.compile(r"^(c_attn|qkv\w*|w_?qkv|query_key_value|in_proj(_\w+)?|kv_\w+)$")
_ATTENTION = re.compile(r"attn|attention")


def block_of(name: str) -> Block:
    """Which block of a transformer the parameter belongs to, by its name alone; a bias belongs to its module's.

    Knows the names of Llama (Hugging Face's and Meta's), Mistral, Mixtral, Qwen, Phi, Gemma, GPT-2 (also with split
    query and key), GPT-NeoX, GPT-OSS, T5, BART, Whisper, BERT, ModernBERT, RoBERTa and DistilBERT, LoRA's matrices on
    any of them, and wrapper prefixes. A norm is a norm wherever it stands. Query, key and value in one matrix
    (`c_attn`, `qkv_proj`, `query_key_value`) are "vo", the more cautious choice of the two: a lower learning rate, a
    finer second moment. Poolers and classifiers are "head". What is none of these is "other".
    """
    it = _name(name)
    if _is_norm(it, 1):
        return "norm"
    if _is_head(it):
        return "head"
    if _is_embedding(it) or any(part.startswith(("lora_embedding_", "trainable_tokens_")) for part in it.parts):
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
