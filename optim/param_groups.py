"""What a parameter is, by its name and shape: a hidden matrix or the rest, and which block of a transformer."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from optim.saved import bare_name

Named = list[tuple[str, Tensor]]


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether a rule for hidden matrices should have this parameter.

    Yes for tensors of two or more dimensions, LoRA's A and B among them (on a head too); no for embeddings (also LoRA
    on embeddings), what is behind the last layer (`block_of` calls it "head": output heads, poolers, classifiers),
    norms, biases, and any vector or scalar. A name that tells nothing is told by its shape. Convolutions count as
    matrices, the first of a network too: name it apart if it should not.
    """
    parts = _parts(name)
    if param.ndim < 2:
        return False
    return bool({"lora_a", "lora_b"} & set(parts)) or (parts[-1] != "bias" and outside_block(name) is None)


_CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}


def layouts(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, bool]]:
    """name -> how its matrices lie in memory, for those that are not [outputs, inputs]; see `MatrixRule`.

    transposed: GPT-2's Conv1D keeps [inputs, outputs], where copies of GPT-2 with the same names have `nn.Linear`.
    `c_attn` and `c_fc` have more outputs than inputs, which tells for all four kinds.
    batched: the experts of a mixture in one tensor of three dimensions.
    """
    found: dict[str, dict[str, bool]] = {}
    conv1d: dict[str, str] = {}
    wider = []
    for name, param in named_parameters:
        parts = [part for part in _parts(name) if part != "base_layer"]
        if param.ndim == 3 and any("expert" in part for part in parts):
            found[name] = {"batched": True}
        if param.ndim == 2 and parts[-1] == "weight" and len(parts) > 1 and parts[-2] in _CONV1D:
            conv1d[name] = parts[-2]
            if parts[-2] in ("c_attn", "c_fc"):
                wider.append(param.shape[0] < param.shape[1])
    if wider and all(wider):
        found |= {name: {"transposed": True} for name in conv1d}
    return found


def with_names(entries: Iterable[Any], otherwise: str) -> Named:
    """The entries, each a name with its tensor. Raises: TypeError with the message `otherwise` if one is not."""
    found = list(entries)
    if all(isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in found):
        return found
    raise TypeError(otherwise)


def split_matrices(named_parameters: Iterable[tuple[str, Tensor]]) -> tuple[Named, Named]:
    """(hidden matrices, rest), each in the given order; see `is_matrix`.

    Raises: TypeError if the parameters have no names, for the split needs them.
    """
    matrices: Named = []
    rest: Named = []
    otherwise = "splitting matrices from the rest needs names: pass model.named_parameters()"
    for entry in with_names(named_parameters, otherwise):
        (matrices if is_matrix(*entry) else rest).append(entry)
    return matrices, rest


Block: TypeAlias = Literal["embedding", "qk", "vo", "ffn", "norm", "head"]
"""The kinds of parameters that a transformer has, as arXiv 2502.19002 (blockwise learning rates) divides them."""

BLOCKS: tuple[Block, ...] = get_args(Block)

# of single components of a dotted name, in lower case
_NORM = re.compile(r"norm|^ln(_|\d|$)")
_HEAD = re.compile(r"^(lm_head|head|embed_out|unembed|(pre_)?classifier|score|cls|pooler|qa_outputs|vocab_\w+)$")
_EMBEDDING = re.compile(r"embed|^w[tp]e$|^shared$|^relative_\w*bias$")
_FFN = re.compile(r"mlp|feed_?forward|ffn|moe|expert|intermediate|^(fc\d|c_fc|(gate|up|down|gate_up)_proj|dense_.*h)$")
_QK = re.compile(r"^(w?[qk]|[qk](_[ab])?_proj|[qk]_(attn|lin)|query|key)$")
_VO = re.compile(r"^(w?[vo]|[vo]_(proj|attn|lin)|value|out_lin|out_proj)$")
_FUSED = re.compile(r"^(c_attn|qkv\w*|w_?qkv|query_key_value|in_proj(_\w+)?|kv_\w+)$")
_ATTENTION = re.compile(r"attn|attention")


def _parts(name: str) -> list[str]:
    return bare_name(name).lower().split(".")


def outside_block(name: str) -> Literal["norm", "head", "embedding"] | None:
    """Which of the blocks without hidden matrices the parameter belongs to, by its name; None for all others."""
    parts = _parts(name)

    def has(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(part) for part in parts)

    if has(_NORM):
        return "norm"
    if has(_HEAD) or ("output" in parts and "dense" not in parts and not has(_ATTENTION)):
        return "head"
    return "embedding" if has(_EMBEDDING) else None


def block_of(name: str) -> Block:
    """Which block of a transformer the parameter belongs to, by its name alone; a bias belongs to its module's.

    Knows the names of Llama (Hugging Face's and Meta's), Mistral, Mixtral, Qwen, Phi, Gemma, GPT-2 (also with split
    query and key), GPT-NeoX, BERT, RoBERTa and DistilBERT, LoRA's matrices on any of them, and wrapper prefixes.
    A norm is a norm wherever it stands. Query, key and value in one matrix (`c_attn`, `qkv_proj`,
    `query_key_value`) are "vo", the more cautious choice of the two: a lower learning rate, a finer second moment.
    Poolers and classifiers are "head".
    Raises: ValueError naming a parameter that is none of these.
    """
    parts = _parts(name)

    def has(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(part) for part in parts)

    in_attention = has(_ATTENTION)
    outside = outside_block(name)
    if outside is not None:
        return outside
    if has(_FFN):
        return "ffn"
    if has(_QK):
        return "qk"
    if has(_VO) or has(_FUSED) or (in_attention and {"c_proj", "dense", "proj"} & set(parts)):
        return "vo"
    if "output" in parts and not in_attention:  # BERT's second matrix
        return "ffn"
    raise ValueError(
        f"parameter {name!r} is in no block of a transformer that its name tells ({', '.join(BLOCKS)}); "
        "give it a param group of its own"
    )


PAPER_RATIOS: Mapping[Block, float] = MappingProxyType(
    {"embedding": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0, "head": 1.0}
)
"""A block's learning rate over the base: tuned once, for a Llama of 0.25B parameters, and reused (arXiv 2502.19002)."""

Ratios: TypeAlias = Literal["paper"] | Mapping[str, float]


def blockwise(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    lr: float | Tensor,
    ratios: Ratios = "paper",
    blocks: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Param groups with the blockwise learning rate: one a block, at `lr` times the block's ratio.

        optimizer = AdamW(blockwise(model.named_parameters(), lr=6e-4), betas=(0.9, 0.95), weight_decay=0.1)
        factors = group_factors(optimizer, "blockwise_cosine", total_steps=10_000, warmup_steps=600)

    ratios: block -> ratio to `lr`; "paper" is `PAPER_RATIOS`; `optim.diagnostics` measures and proposes others.
    blocks: parts of names -> block, looked at before `block_of`, the first match winning; the block may be a new one.
    A group has `lr`, `lr_ratio` (read by `group_factors`), `block`, and its parameters with their names.
    Source: arXiv 2502.19002. It runs AdamW and Adam-mini with betas (0.9, 0.95) and decay 0.1, Lion with (0.95, 0.98)
    and 1.0, and decays every tensor, norms too. Decoupled decay is scaled by a group's rate as well.
    Differs: a tensor in no block is an error, where the AdamW and Lion scripts leave it untrained; position embeddings
    (``wpe``) are embeddings, where the GPT-2 script leaves them at the base rate (``blocks={"wpe": "norm"}``).
    Raises: ValueError naming a parameter that is in no block, or whose block has no ratio; TypeError without names.
    """
    table = _checked_ratios(ratios)
    found: dict[str, Named] = {}
    for entry in with_names(named_parameters, "blockwise learning rates need names: pass model.named_parameters()"):
        name = entry[0]
        block = next((b for part, b in (blocks or {}).items() if part in name), None) or block_of(name)
        if block not in table:
            raise ValueError(f"parameter {name!r} is in block {block!r}, which has no ratio; known: {', '.join(table)}")
        found.setdefault(block, []).append(entry)
    return [
        {"params": named, "lr": lr * table[block], "lr_ratio": table[block], "block": block}
        for block, named in found.items()
    ]


def _checked_ratios(ratios: Ratios) -> dict[str, float]:
    if isinstance(ratios, str):
        if ratios != "paper":
            raise ValueError(f"block ratios {ratios!r}; expected 'paper' or a mapping such as {dict(PAPER_RATIOS)}")
        return {str(block): ratio for block, ratio in PAPER_RATIOS.items()}
    for block, ratio in ratios.items():
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            raise ValueError(f"the ratio of block {block!r} is {ratio!r}; it must be a finite number above 0")
    return {str(block): float(ratio) for block, ratio in ratios.items()}


_EXAMPLES = {
    "embedding": "model.embed_tokens",
    "qk": "model.layers.0.self_attn.q_proj",
    "vo": "model.layers.0.self_attn.o_proj",
    "ffn": "model.layers.0.mlp.up_proj",
    "head": "lm_head",
}


def example_parameters(ratios: Ratios | None = None) -> Named:
    """Matrices without data, one of each kind of block (that has a ratio), to try settings on before a model is there.

    Each side is 5040, a number that almost every number of blocks divides.
    """
    chosen = [block for block in _EXAMPLES if not isinstance(ratios, Mapping) or block in ratios] or ["ffn"]
    return [(f"{_EXAMPLES[block]}.weight", nn.Parameter(torch.empty(5040, 5040, device="meta"))) for block in chosen]


def divide_groups(
    optimizer: torch.optim.Optimizer, divide: Callable[[Named, float | Tensor], list[dict[str, Any]]]
) -> None:
    """Put several param groups in the place of each: those that `divide(named parameters, lr)` makes, but empty ones.

    They have every setting of the old group but those that `divide` gives. For groups built by a class that decides
    on them itself (Muon's two, Adam-mini's shapes).
    Raises: ValueError if parameters have no names.
    """
    groups = []
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError("param groups are divided by name: build the optimizer from model.named_parameters()")
        for part in divide(list(zip(group["param_names"], group["params"], strict=True)), group["lr"]):
            if part["params"]:
                names, params = zip(*part["params"], strict=True)
                groups.append({**group, **part, "params": list(params), "param_names": list(names)})
    optimizer.param_groups[:] = groups


def group_table(optimizer: torch.optim.Optimizer) -> str:
    """What is stepped how, to be read before training: a line a param group, with the first of its tensors."""
    rows = [("group", "rule", "lr", "decay", "tensors", "parameters", "first tensor")]
    seen = {optimizer.defaults["rule"].name: _flat(optimizer.defaults["rule"].describe())}
    for i, group in enumerate(optimizer.param_groups, start=1):
        rule = group["rule"]
        fields = _flat(rule.describe())
        usual = seen.setdefault(rule.name, fields)
        label = ", ".join([rule.name, *(f"{key} {value}" for key, value in fields.items() if value != usual.get(key))])
        count = sum(p.numel() for p in group["params"])
        name = group["param_names"][0] if group.get("param_names") else ""
        rows.append((str(i), label, f"{float(group['lr']):g}", f"{group['weight_decay']:g}",
                     f"{len(group['params']):,}", f"{count:,}", name))  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(7)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if 2 <= k <= 5 else c.ljust(w) for k, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def _flat(described: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's plain values, those of a rule inside it beside its own."""
    flat: dict[str, Any] = {}
    for key, value in described.items():
        flat |= _flat(value) | {key: value["name"]} if isinstance(value, Mapping) else {key: value}
    return flat
