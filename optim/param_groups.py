"""Param groups by what a parameter is: matrices and the rest, blocks of a transformer, norms and biases, names."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from optim.roles import Block, Named, Role, block_of, is_matrix, is_norm_or_bias, roles
from optim.rule import UpdateRule
from optim.saved import bare_name
from optim.settings import ParamGroup

Settings: TypeAlias = Mapping[str, Any]
Assign: TypeAlias = Mapping[str, str | Settings]
"""Part of a name -> what becomes of the parameters that hold it; the first part that a name holds wins."""

NamedParams: TypeAlias = nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""A model, its named parameters, or param groups of them."""


def with_names(entries: Iterable[Any], otherwise: str) -> Named:
    """The entries, each a name with its tensor. Raises: TypeError with the message `otherwise` if one is not."""
    found: list[Any] = [entries] if isinstance(entries, Tensor) else list(entries)
    if all(isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in found):
        return found
    raise TypeError(otherwise)


def trained(model: nn.Module) -> Named:
    """The model's parameters that require a gradient, with their names."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def named_groups(parameters: NamedParams, otherwise: str) -> list[dict[str, Any]]:
    """The param groups of named parameters that these are. Raises: TypeError (`otherwise`) if names are missing."""
    given: list[Any] = trained(parameters) if isinstance(parameters, nn.Module) else list(parameters)
    groups = given if all(isinstance(entry, Mapping) for entry in given) else [{"params": given}]
    return [{**group, "params": with_names(group["params"], otherwise)} for group in groups]


def told_by(parameters: NamedParams) -> dict[str, Role]:
    """What the types of a model's modules tell of its parameters, by name; nothing where no model is given."""
    if not isinstance(parameters, nn.Module):
        return {}
    return {bare_name(name): role for name, role in roles(parameters.named_parameters(), parameters).items()}


def split_matrices(named_parameters: Iterable[tuple[str, Tensor]]) -> tuple[Named, Named]:
    """(hidden matrices, rest), each in the given order; see `optim.roles.roles`.

    Raises: TypeError if the parameters have no names, for the split needs them.
    """
    matrices: Named = []
    rest: Named = []
    otherwise = "splitting matrices from the rest needs names: pass model.named_parameters()"
    for entry in with_names(named_parameters, otherwise):
        (matrices if is_matrix(*entry) else rest).append(entry)
    return matrices, rest


# ---------------------------------------------------------------------------------------------------- by part of a name


def checked_assign(
    own: str, assign: Assign | None, known: Iterable[str], words: Mapping[str, Settings | None], names: Iterable[str]
) -> dict[str, Settings | None]:
    """part of a name -> settings; `words` are short for some. For `assign` of `create`.

    Raises: TypeError if it is no mapping, ValueError for settings that are not `known` or a part that no name holds.
    """
    if assign is None:
        return {}
    if not isinstance(assign, Mapping):
        raise TypeError(f"{own}: assign = {assign!r}; expected a mapping such as {{'lm_head': {{'lr': 1e-4}}}}")
    names, known = list(names), set(known)
    meant: dict[str, Settings | None] = {}
    for part, choice in assign.items():
        if isinstance(choice, Mapping) and set(choice) <= known:
            meant[part] = choice
        elif isinstance(choice, str) and choice in words:
            meant[part] = words[choice]
        else:
            short = ", ".join(map(repr, words)) + (" or " if words else "")
            raise ValueError(
                f"{own}: assign[{part!r}] = {choice!r}; expected {short}settings out of {', '.join(sorted(known))}"
            )
    check_parts(f"{own}: assign", meant, names)
    return meant


def check_parts(what: str, parts: Iterable[str], names: Iterable[str]) -> None:
    """Raises: ValueError for a part that is in no name."""
    names = list(names)
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"{what} names {part!r}, which is in the name of no parameter")


def part_in(name: str, parts: Iterable[str]) -> str | None:
    """The first of these parts that the name holds."""
    return next((part for part in parts if part in name), None)


class Assigned:
    """A division of param groups by parts of names, each with its own settings."""

    def __init__(self, meant: Mapping[str, Settings | None]) -> None:
        self.meant = meant

    def __call__(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The group's parameters that no part names, and a group for each part, with its settings."""
        by_part: dict[str | None, Named] = {None: []} | {part: [] for part in self.meant}
        for entry in group["params"]:
            by_part[part_in(entry[0], self.meant)].append(entry)
        groups = []
        for part, named in by_part.items():
            settings = dict(self.meant[part] or {}) if part is not None else {}
            rule: UpdateRule = group["rule"]
            fields = {key: settings.pop(key) for key in rule.settings() & set(settings)}
            groups.append({**group, **settings, "params": named, "rule": rule.with_settings(**fields)})
        return groups


# -------------------------------------------------------------------------------------------------- norms and biases

# transformers.Trainer.get_decay_parameter_names: what people's weight_decay is tuned for
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def without_decay(names: Iterable[str], model: nn.Module | None = None) -> set[str]:
    """Those of the parameters `names` that Trainer gives no weight decay: biases and norms, by name or by type.

    The one rule of this suite: `create(decay_all=False)`, `hf.resolve`, `datatools train`, and checkpoints of Trainer,
    whose states it puts in order.
    model: the model they are of, whose `nn.LayerNorm` layers are norms whatever their name.
    """
    norms = {
        f"{layer}.{own}".removeprefix(".")
        for layer, module in (model.named_modules() if model is not None else ())
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    return {name for name in names if name in norms or _UNDECAYED.search(name.lower())}


class SpareNorms:
    """A division of param groups into those with weight decay and those without: `without_decay` of the model.

    Of parameters that are of no model, a bias or norm with a name that Trainer does not know (``ln_1``) is spared too.
    """

    def __init__(self, model: nn.Module | None) -> None:
        names = [] if model is None else [name for name, _ in model.named_parameters()]
        self.known = dict.fromkeys(names, False) | dict.fromkeys(without_decay(names, model), True)

    def _spared(self, name: str, param: Tensor) -> bool:
        if name in self.known:
            return self.known[name]
        return bool(without_decay([name])) or is_norm_or_bias(name, param)

    def __call__(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The group's parameters with its weight decay, and those without any."""
        decayed: Named = []
        spared: Named = []
        for entry in group["params"]:
            (spared if self._spared(*entry) else decayed).append(entry)
        return [{**group, "params": decayed}, {**group, "params": spared, "weight_decay": 0.0}]


# --------------------------------------------------------------------------------------------- blocks of a transformer

PAPER_RATIOS: Mapping[Block, float] = MappingProxyType(
    {"embedding": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0, "head": 1.0, "other": 1.0}
)
"""A block's learning rate over the base: tuned once, for a Llama of 0.25B parameters, and reused (arXiv 2502.19002).
What the paper does not know, "other", has the base rate."""

Ratios: TypeAlias = Literal["paper"] | Mapping[str, float]


def blockwise(
    named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
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
    What is in none is "other", at the base rate unless `ratios` has it; one UserWarning names such parameters.
    A group has `lr`, `lr_ratio` (read by `group_factors`), `block`, and its parameters with their names.
    Source: arXiv 2502.19002. It runs AdamW and Adam-mini with betas (0.9, 0.95) and decay 0.1, Lion with (0.95, 0.98)
    and 1.0, and decays every tensor, norms too. Decoupled decay is scaled by a group's rate as well.
    Differs: a tensor in no block trains, at the base rate, where the AdamW and Lion scripts leave it untrained;
    position embeddings (``wpe``) are embeddings, where the GPT-2 script leaves them at the base rate
    (``blocks={"wpe": "norm"}``).
    Raises: ValueError naming a parameter whose block has no ratio; TypeError without names.
    """
    if isinstance(named_parameters, nn.Module):
        named_parameters = trained(named_parameters)
    named = with_names(named_parameters, "blockwise learning rates need names: pass model.named_parameters()")
    return Blockwise(ratios, blocks, [name for name, _ in named])({"params": named, "lr": lr})


class Blockwise:
    """A division of param groups by block of a transformer, each at its ratio to the group's rate; see `blockwise`.

    names: those that are known beforehand, to warn once of parameters in no block.
    """

    def __init__(self, ratios: Ratios, blocks: Mapping[str, str] | None, names: Iterable[str]) -> None:
        self.ratios = _checked_ratios(ratios)
        self.ratios.setdefault("other", 1.0)
        names = list(names)
        self.blocks = dict(blocks or {})
        check_parts("blocks", self.blocks, names)
        if ratios == "paper" or "other" not in ratios:
            warn_of_strangers(names, self.blocks, "have the base learning rate", "blocks={{{part!r}: 'norm'}}")

    def __call__(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """A group for each block, with `lr_ratio` and `block`."""
        found: dict[str, Named] = {}
        for entry in group["params"]:
            part = part_in(entry[0], self.blocks)
            block = block_of(entry[0]) if part is None else self.blocks[part]
            if block not in self.ratios:
                raise ValueError(
                    f"parameter {entry[0]!r} is in block {block!r}, which has no ratio; known: {', '.join(self.ratios)}"
                )
            found.setdefault(block, []).append(entry)
        return [
            {**group, "params": named, "lr": group["lr"] * ratio, "lr_ratio": ratio, "block": block}
            for block, named in found.items()
            for ratio in (self.ratios[block],)
        ]


def warn_of_strangers(names: Iterable[str], chosen: Iterable[str], fate: str, remedy: str) -> None:
    """One UserWarning of the parameters whose names tell no block of a transformer, and that nothing else chose."""
    names, chosen = list(names), list(chosen)
    strangers = [name for name in names if block_of(name) == "other" and part_in(name, chosen) is None]
    if strangers:
        last = [part for part in strangers[0].split(".") if part not in ("weight", "bias") and not part.isdigit()]
        some = ", ".join(map(repr, strangers[:3])) + (", ..." if len(strangers) > 3 else "")
        warnings.warn(
            f"{len(strangers)} of {len(names)} parameters are in no block of a transformer that their names tell "
            f"({some}): they {fate}; say otherwise with {remedy.format(part=(last or strangers[:1])[-1])}",
            UserWarning,
            stacklevel=4,
        )


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


def divide_groups(optimizer: torch.optim.Optimizer, divide: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """Put several param groups in the place of each: those that `divide(group)` makes of it, but empty ones.

    The `params` of the groups that `divide` gets and makes are named parameters. For groups built by a class that
    decides on them itself (Muon's two, Adam-mini's shapes). An `Optimizer` divides groups that are added later as well.
    Raises: ValueError if parameters have no names.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for part in by_name(divide, group):
            names, params = zip(*part["params"], strict=True)
            made = {**part, "params": list(params), "param_names": list(names)}
            groups.append(ParamGroup(made) if "rule" in made else made)  # not those of a torch optimizer
    optimizer.param_groups[:] = groups
    if hasattr(optimizer, "divisions"):
        optimizer.divisions = [*optimizer.divisions, divide]


def by_name(divide: Callable[[dict[str, Any]], list[dict[str, Any]]], group: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups that `divide` makes of this one, but empty ones. Raises: ValueError for parameters without names."""
    named = list(zip(group["param_names"], group["params"], strict=True)) if "param_names" in group else group["params"]
    message = "param groups are divided by name: build the optimizer from model.named_parameters()"
    try:
        named = with_names(named, message)
    except TypeError:
        raise ValueError(message) from None
    whole = {key: value for key, value in group.items() if key != "param_names"} | {"params": named}
    return [part for part in divide(whole) if part["params"]]


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
