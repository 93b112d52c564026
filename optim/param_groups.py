"""Param groups by the role of parameters: matrices and the rest, blocks of a transformer, norms and biases, names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optim.roles import Named, Role, is_matrix, is_norm_or_bias, roles
from optim.rule import UpdateRule
from optim.saved import bare_name
from optim.settings import ParamGroup

Settings: TypeAlias = Mapping[str, Any]
Assign: TypeAlias = Mapping[str, str | Settings]
"""Part of a name -> what happens to the parameters whose names contain it; the first part that a name contains wins."""

NamedParams: TypeAlias = nn.Module | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""A model, its named parameters, or param groups of named parameters."""


def with_names(entries: Iterable[Any], otherwise: str) -> Named:
    """Return the entries, each a name with its tensor.

    Args:
        entries: What should be (name, tensor) pairs.
        otherwise: The error message for entries without names.

    Returns:
        The pairs as a list.

    Raises:
        TypeError: With the message `otherwise`, if an entry has no name.
    """
    found: list[Any] = [entries] if isinstance(entries, Tensor) else list(entries)
    if all(isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in found):
        return found
    raise TypeError(otherwise)


def trained(model: nn.Module) -> Named:
    """Return the model's parameters that require a gradient, with their names.

    Args:
        model: The model.

    Returns:
        (name, parameter) pairs.
    """
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def named_groups(parameters: NamedParams, otherwise: str) -> list[dict[str, Any]]:
    """Return the param groups that these named parameters form.

    Args:
        parameters: A model, its named parameters, or param groups of named parameters.
        otherwise: The error message for parameters without names.

    Returns:
        Param groups with (name, parameter) pairs under `params`.

    Raises:
        TypeError: With the message `otherwise`, if names are missing.
    """
    given: list[Any] = trained(parameters) if isinstance(parameters, nn.Module) else list(parameters)
    groups = given if all(isinstance(entry, Mapping) for entry in given) else [{"params": given}]
    return [{**group, "params": with_names(group["params"], otherwise)} for group in groups]


def told_by(parameters: NamedParams) -> dict[str, Role]:
    """Return the roles that a model's module types assign to its parameters.

    Args:
        parameters: A model, its named parameters, or param groups of named parameters.

    Returns:
        The roles by parameter name; empty if no model is given.
    """
    if not isinstance(parameters, nn.Module):
        return {}
    return {bare_name(name): role for name, role in roles(parameters.named_parameters(), parameters).items()}


def split_matrices(named_parameters: Iterable[tuple[str, Tensor]]) -> tuple[Named, Named]:
    """Return (hidden matrices, rest), each in the given order; see `optim.roles.roles`.

    Args:
        named_parameters: (name, parameter) pairs.

    Returns:
        The pairs of the hidden matrices, and those of the rest.

    Raises:
        TypeError: If the parameters have no names, which the split needs.

    Example:
        >>> from optim import split_matrices
        >>> model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(10, 4), "proj": torch.nn.Linear(4, 4)})
        >>> matrices, rest = split_matrices(model.named_parameters())
        >>> [name for name, _ in matrices]
        ['proj.weight']
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
    """Return `assign` as a mapping from part of a name to settings, after checking it; see `create`.

    Args:
        own: The owner of the setting, for error messages.
        assign: The mapping, or None.
        known: The settings that may be assigned.
        words: Words that stand for settings, such as "adamw".
        names: The names of the parameters.

    Returns:
        A mapping from part of a name to settings, in the given order.

    Raises:
        TypeError: If `assign` is not a mapping.
        ValueError: For settings that are not `known`, or a part that no name contains.

    Example:
        >>> from optim import checked_assign
        >>> checked_assign("AdamW", {"bias": {"lr": 0.1}}, {"lr"}, {}, ["layer.bias"])
        {'bias': {'lr': 0.1}}
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
            keys = ", ".join(sorted(known))
            raise ValueError(f"{own}: assign[{part!r}] = {choice!r}; expected {short}a mapping with keys among {keys}")
    check_parts(f"{own}: assign", meant, names)
    return meant


def check_parts(what: str, parts: Iterable[str], names: Iterable[str]) -> None:
    """Check that every part occurs in a name.

    Args:
        what: The setting that has the parts, for the message.
        parts: Parts of names.
        names: The names of the parameters.

    Raises:
        ValueError: For a part that occurs in none.
    """
    names = list(names)
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"{what} names {part!r}, which does not occur in the name of any parameter")


def part_in(name: str, parts: Iterable[str]) -> str | None:
    """Return the first of the given parts that the name contains.

    Args:
        name: The name of a parameter.
        parts: Parts of names.

    Returns:
        The part, or None if the name contains none of them.
    """
    return next((part for part in parts if part in name), None)


class Assigned:
    """A division of param groups by parts of names, each with its own settings.

    Args:
        meant: A mapping from part of a name to the settings of the parameters that contain it.

    Example:
        >>> from optim import AdamW, Assigned, divide_groups
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3)
        >>> divide_groups(optimizer, Assigned({"bias": {"lr": 0.1}}))
        >>> [(group["param_names"], group["lr"]) for group in optimizer.param_groups]
        [(['weight'], 0.001), (['bias'], 0.1)]
    """

    def __init__(self, meant: Mapping[str, Settings | None]) -> None:
        self.meant = meant

    def __call__(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Divide a group by the parts of names.

        Args:
            group: A param group with named parameters.

        Returns:
            One group of the parameters that no part names, and one group per part, with its settings.
        """
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

# from transformers.Trainer.get_decay_parameter_names, for which most values of weight_decay were tuned
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def without_decay(names: Iterable[str], model: nn.Module | None = None) -> set[str]:
    """Return the names of the parameters that have no weight decay: biases and norms, by name or by type.

    This is the only such rule of the three packages, and it is that of transformers' Trainer. `hf.resolve`,
    `create(decay_all=False)`, `zeroth_order.decay_groups` and `datatools train` follow it. It is also used to read
    checkpoints of Trainer, in which it determines the order of the states.

    Args:
        names: The names of the parameters.
        model: The model that they belong to, whose `nn.LayerNorm` layers are norms whatever their names are.

    Returns:
        Those of the names that have no weight decay.

    Example:
        >>> from optim import without_decay
        >>> sorted(without_decay(["layers.0.norm.weight", "layers.0.proj.weight", "layers.0.proj.bias"]))
        ['layers.0.norm.weight', 'layers.0.proj.bias']
    """
    norms = {
        f"{layer}.{own}".removeprefix(".")
        for layer, module in (model.named_modules() if model is not None else ())
        if isinstance(module, nn.LayerNorm)
        for own, _ in module.named_parameters(recurse=False)
    }
    return {name for name in names if name in norms or _UNDECAYED.search(name.lower())}


class SpareNorms:
    """A division of param groups into those with weight decay and those without, by `without_decay` of the model.

    If a parameter does not belong to the model, or there is no model, a bias or norm with a name that Trainer does not
    recognise (``ln_1``) has no weight decay either.

    Args:
        model: The model, if there is one.

    Example:
        >>> from optim import AdamW, SpareNorms, divide_groups
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1)
        >>> divide_groups(optimizer, SpareNorms(model))
        >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [(['weight'], 0.1), (['bias'], 0.0)]
    """

    def __init__(self, model: nn.Module | None) -> None:
        names = [] if model is None else [name for name, _ in model.named_parameters()]
        self.known = dict.fromkeys(names, False) | dict.fromkeys(without_decay(names, model), True)

    def _spared(self, name: str, param: Tensor) -> bool:
        if name in self.known:
            return self.known[name]
        return bool(without_decay([name])) or is_norm_or_bias(name, param)

    def __call__(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Divide a group by weight decay.

        Args:
            group: A param group with named parameters.

        Returns:
            A group with the weight decay of the given one, and a group without weight decay.
        """
        decayed: Named = []
        spared: Named = []
        for entry in group["params"]:
            (spared if self._spared(*entry) else decayed).append(entry)
        return [{**group, "params": decayed}, {**group, "params": spared, "weight_decay": 0.0}]


def divide_groups(optimizer: torch.optim.Optimizer, divide: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """Replace each param group by the groups that `divide` makes of it, except empty ones.

    It is meant for optimizers that already have groups of their own (Muon's two groups, or Adam-mini's shapes). An
    `Optimizer` also divides groups that are added later.

    Args:
        optimizer: An optimizer that was built from named parameters.
        divide: A function from a group to groups; the `params` of all of them are named parameters.

    Raises:
        ValueError: If parameters have no names.

    Example:
        >>> from optim import AdamW, divide_groups
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3)
        >>> divide_groups(optimizer, lambda group: [group | {"params": [entry]} for entry in group["params"]])
        >>> [group["param_names"] for group in optimizer.param_groups]
        [['weight'], ['bias']]
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for part in by_name(divide, group):
            names, params = zip(*part["params"], strict=True)
            made = {**part, "params": list(params), "param_names": list(names)}
            groups.append(ParamGroup(made) if "rule" in made else made)  # groups of torch optimizers remain dicts
    optimizer.param_groups[:] = groups
    if hasattr(optimizer, "divisions"):
        optimizer.divisions = [*optimizer.divisions, divide]


def by_name(divide: Callable[[dict[str, Any]], list[dict[str, Any]]], group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups that `divide` makes of the given one, except empty ones.

    Args:
        divide: A function from a group to groups; the `params` of all of them are named parameters.
        group: A param group.

    Returns:
        The groups that have parameters.

    Raises:
        ValueError: For parameters without names.
    """
    named = list(zip(group["param_names"], group["params"], strict=True)) if "param_names" in group else group["params"]
    message = "param groups are divided by name: build the optimizer from model.named_parameters()"
    try:
        named = with_names(named, message)
    except TypeError:
        raise ValueError(message) from None
    whole = {key: value for key, value in group.items() if key != "param_names"} | {"params": named}
    return [part for part in divide(whole) if part["params"]]


def group_table(optimizer: torch.optim.Optimizer) -> str:
    """Return a table of how each tensor is stepped, with one line per param group and its first tensor.

    Args:
        optimizer: The optimizer.

    Returns:
        The table as text, to read before training.

    Example:
        >>> from optim import create, group_table
        >>> print(group_table(create("adamw", torch.nn.Linear(4, 2), lr=1e-3)))
        group  rule      lr  decay  tensors  parameters  first tensor
        1      adamw  0.001      0        2          10  weight
    """
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
    """Return a rule's plain values together with those of a rule inside it."""
    flat: dict[str, Any] = {}
    for key, value in described.items():
        flat |= _flat(value) | {key: value["name"]} if isinstance(value, Mapping) else {key: value}
    return flat
