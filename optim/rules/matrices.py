"""What the rules for matrices share: which matrices a tensor contains, and the class that steps the rest by AdamW."""

import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim import stacks
from optim.checks import check_flag, check_positive, check_positive_counts
from optim.moments import zero_step
from optim.optimizer import Group, Optimizer
from optim.param_groups import Assign, NamedParams, Settings, checked_assign, named_groups, part_in, told_by, with_names
from optim.roles import Kind, Named, Role, roles
from optim.rule import OfParam, State, UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.divided import divided
from optim.saved import bare_name
from optim.sharding import replicated


@dataclass(frozen=True, kw_only=True)
class MatrixRule(UpdateRule, ABC):
    """A rule for matrices [m, n], with m outputs and n inputs as in `torch.nn.Linear`; not elementwise.

    Tensors with more dimensions are treated as [dim 0, rest]. Other layouts are fields, which `MatrixOptimizer` sets if
    names and shapes, or the model, show them.

    Args:
        transposed: Whether the parameter is [inputs, outputs], as in GPT-2's Conv1D.
        batched: True if a tensor with three dimensions is a stack of matrices, such as the experts of a mixture. A
            number if a tensor with two dimensions consists of that many matrices, concatenated along dimension 0
            (DBRX). With `transposed`, each of them is transposed.
        split_sizes: The numbers of rows of the matrices that the tensor contains, such as those of (q, k, v). The step
            is that of separate parameters. The published codes treat such a tensor as one matrix.
        split_groups: How often the pattern of `split_sizes` is repeated along the rows: 1 if the matrices follow one
            another, and the number of heads for GPT-NeoX, whose rows are those of (q, k, v) head by head.
        num_heads: The number of matrices with equally many rows that the tensor contains. It excludes `split_sizes`.
        match_rms: The root mean square to which the direction of each matrix is scaled, or None for the rule's own
            scale. With 0.2, which is about that of AdamW's directions, AdamW's learning rate and weight decay carry
            over to every rule (Liu et al. 2025, arXiv 2502.16982).
    """

    elementwise: ClassVar[bool] = False
    divides: ClassVar[str] = "any"
    """Into which matrices the rule can divide a tensor: "any", "equal" ones (`num_heads`), or "none"."""

    transposed: bool = False
    batched: bool | int = False
    split_sizes: tuple[int, ...] | None = None
    split_groups: int = 1
    num_heads: int | None = None
    match_rms: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_flag(name, transposed=self.transposed)
        if not isinstance(self.batched, bool) and not (_is_count(self.batched) and self.batched > 1):
            raise ValueError(f"{name}: batched = {self.batched!r}; it must be True, False or an integer of at least 2")
        if self.split_sizes is not None:
            sizes = self.split_sizes
            if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes or not all(map(_is_count, sizes)):
                raise ValueError(f"{name}: split_sizes = {sizes!r}; expected numbers of rows, such as (576, 192, 192)")
            object.__setattr__(self, "split_sizes", tuple(sizes))
        if self.num_heads is not None:
            check_positive_counts(name, num_heads=self.num_heads)
        check_positive_counts(name, split_groups=self.split_groups)
        if self.split_groups > 1 and self.split_sizes is None:
            raise ValueError(f"{name}: split_groups = {self.split_groups} needs split_sizes, the pattern of each group")
        if self.divides != "any" and self.split_sizes is not None:
            whole = "whole, or equal heads" if self.divides == "equal" else "whole"
            raise ValueError(f"{name}: {name[:-4]} does not support split_sizes; its matrices are {whole}")
        if self.divides == "none" and self.num_heads is not None:
            raise ValueError(f"{name}: {name[:-4]} does not support num_heads; its matrices are whole")
        if self.match_rms is not None:
            check_positive(name, match_rms=self.match_rms)
        if self.num_heads is not None and self.split_sizes is not None:
            raise ValueError(f"{name}: split_sizes and num_heads both divide the rows; set only one of them")

    def init(self, param: OfParam) -> State:
        """Return a zero step count; rules with more state add their entries.

        Raises:
            ValueError: For a vector or scalar.
        """
        self.check_layout(param)
        return {"step": zero_step()}

    def check_layout(self, param: Tensor) -> None:
        """Check that the tensor has the layout that the fields describe.

        Args:
            param: The parameter.

        Raises:
            ValueError: For a tensor that is not a matrix, or does not fit the fields.
        """
        name, shape = type(self).__name__, tuple(param.shape)
        if param.ndim < 2:
            raise ValueError(
                f"{name}: a parameter of shape {shape} is not a matrix; use another rule for it "
                f"(create({self.name!r}, model.named_parameters(), ...) puts it in an AdamW group)"
            )
        if self.batched is True and param.ndim != 3:
            raise ValueError(f"{name}: batched=True needs tensors with three dimensions; a parameter has shape {shape}")
        if self._below and (param.ndim != 2 or shape[0] % self._below):
            raise ValueError(f"{name}: a parameter of shape {shape} cannot be divided into {self._below} matrices")
        if self.transposed and param.ndim > 3:
            raise ValueError(f"{name}: transposed=True needs matrices; a parameter has shape {shape}")
        _, rows, columns = self.matrix_shape(shape)
        rows = columns if self.transposed else rows
        if self.split_sizes is not None and sum(self.split_sizes) * self.split_groups != rows:
            often = f", {self.split_groups} times," if self.split_groups > 1 else ""
            raise ValueError(
                f"{name}: split_sizes {self.split_sizes}{often} do not add up to the {rows} rows of a parameter of "
                f"shape {shape}"
            )
        if self.num_heads is not None and rows % self.num_heads:
            raise ValueError(
                f"{name}: the {rows} rows of a parameter of shape {shape} cannot be divided into {self.num_heads} heads"
            )

    def step_all(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """Step all parameters; those of equal shape are stepped together."""
        stacks.step(self, params, grads, states, lr=lr, weight_decay=weight_decay)

    @property
    def _below(self) -> int:
        """The number of matrices concatenated along dimension 0 of a tensor with two dimensions; 0 in other layouts."""
        return 0 if isinstance(self.batched, bool) else self.batched

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the number and shape of the matrices in a tensor as they are stored, before transposition.

        Args:
            shape: The shape of the tensor.

        Returns:
            (number of matrices, rows, columns).
        """
        if self._below:
            return self._below, shape[0] // self._below, shape[1]
        lead = (shape[0], shape[1]) if self.batched else (1, shape[0])
        return *lead, math.prod(shape[2 if self.batched else 1 :])

    def stacks(self, x: Tensor) -> list[Tensor]:
        """Return the matrices in x as stacks [k, m, n]: one stack, or several under `split_sizes`.

        Args:
            x: A tensor of the parameter's layout. It may also have one number per row or column of a matrix.

        Returns:
            Stacks of shape [k, m, n].
        """
        y = x.reshape(self.matrix_shape(x.shape))
        if self.transposed:
            y = y.mT
        if self.num_heads:
            y = y.reshape(y.shape[0] * self.num_heads, y.shape[1] // self.num_heads, y.shape[2])
        if not self.split_sizes:
            return [y]
        if self.split_groups == 1:
            return list(torch.split(y, list(self.split_sizes), dim=1))
        grouped = replicated(y).reshape(y.shape[0], self.split_groups, -1, y.shape[2])
        return [part.flatten(1, 2) for part in torch.split(grouped, list(self.split_sizes), dim=2)]

    def directed(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Return the direction whose matrices are given, scaled to `match_rms` if that is set.

        Args:
            stacks: Stacks of shape [k, m, n].
            shape: The shape of the parameter.

        Returns:
            A tensor of that shape.
        """
        if self.match_rms is not None:
            stacks = [
                x
                * (self.match_rms / x.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny))
                for x in stacks
            ]
        return self.joined(stacks, shape)

    def joined(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Return the tensor whose matrices are given: the inverse of `stacks`.

        Args:
            stacks: Stacks of shape [k, m, n].
            shape: The shape of the tensor.

        Returns:
            A tensor of that shape.
        """
        if self.split_groups > 1:
            y = torch.cat([x.reshape(x.shape[0], self.split_groups, -1, x.shape[2]) for x in stacks], dim=2).flatten(
                1, 2
            )
        else:
            y = torch.cat(list(stacks), dim=1) if len(stacks) > 1 else stacks[0]
        if self.num_heads:
            y = y.reshape(y.shape[0] // self.num_heads, y.shape[1] * self.num_heads, y.shape[2])
        return (y.mT if self.transposed else y).reshape(tuple(shape))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Split:
    """The way in which a `MatrixOptimizer` divides groups of named parameters, also those that are added later.

    Args:
        own: The name of the optimizer's class, for error messages.
        rule: The class of the matrix rule.
        rest: The rule of all other parameters.
        rest_settings: The learning rate and weight decay of the rest, if they are given.
        assign: A mapping from part of a name to settings of the matrix rule, or to None for the rest.
        kinds: The kinds of parameters that the matrix rule steps, with its settings for them.
        told: The roles that the model's module types assign to parameters, by name.
        rest_needs_lr: If not empty, the reason why the rest needs its own learning rate.
        split_fused: Whether fused matrices are stepped as separate ones.
    """

    own: str
    rule: type[UpdateRule]
    rest: UpdateRule
    rest_settings: Settings
    assign: Mapping[str, Settings | None]
    kinds: Mapping[Kind, Settings]
    told: Mapping[str, Role] = field(default_factory=dict)
    rest_needs_lr: str = ""
    split_fused: bool = True

    def __call__(self, group: Group, optimizer: Optimizer) -> list[Group]:
        """Divide a group into one for each layout of matrices, and one for the rest.

        Args:
            group: A param group with named parameters.
            optimizer: The optimizer that the group is added to.

        Returns:
            The groups, each with the settings of the given one.

        Raises:
            TypeError: For parameters without names.
            ValueError: If the rest needs its own learning rate and has none.
        """
        if "rule" in group:
            return [group]
        named = with_names(group["params"], f"{self.own} finds matrices by name: pass model.named_parameters()")
        earlier = [entry for g in optimizer.param_groups for entry in zip(g["param_names"], g["params"], strict=True)]
        found = roles([*earlier, *named])
        known = self.rule().settings()
        parts: dict[str, tuple[Settings, bool, Named]] = {}  # settings, whether they are matrices, parameters
        for name, param in named:
            role = self.told.get(bare_name(name), found[name])
            settings = self._settings(name, param, role)
            matrix = settings is not None
            if settings is None:
                settings = {key: value for key, value in self._assigned(name).items() if key not in known}
            else:
                layout = {key: value for key, value in role.layout.items() if key in known}
                if self.split_fused:
                    layout |= divided(optimizer.defaults["rule"], role, {**group, **settings})
                settings = layout | dict(settings)
            parts.setdefault(f"{matrix} {settings!r}", (settings, matrix, []))[2].append((name, param))
        common = {key: value for key, value in group.items() if key != "params"}
        adamw = {key.removeprefix("adamw_"): common.pop(key) for key in list(common) if key.startswith("adamw_")}
        ordered = sorted(parts.values(), key=lambda part: not part[1])  # matrices first
        return [
            common | dict(settings) | {"params": of} if matrix else self._rest(of, common, adamw, settings)
            for settings, matrix, of in ordered
        ]

    def _assigned(self, name: str) -> Settings:
        part = part_in(name, self.assign)
        return {} if part is None else self.assign[part] or {}

    def _settings(self, name: str, param: Tensor, role: Role) -> Settings | None:
        """Return the settings of the matrix rule for a parameter, or None if AdamW steps it."""
        known = self.rule().settings()
        part = part_in(name, self.assign)
        whole = role.layout.get("batched") and "batched" not in known  # the rule would treat a stack as one matrix
        own = None if whole else self.kinds.get(role.kind)
        if part is None:
            return own
        chosen = self.assign[part]
        if not chosen:  # "adamw" or "matrix"
            return chosen
        if param.ndim > 1 and set(chosen) & known:
            return chosen
        return None if own is None else {**own, **chosen}

    def _rest(self, named: Named, common: Group, adamw: Group, chosen: Settings) -> Group:
        own: Group = dict(self.rest_settings)
        own |= {key: adamw[key] for key in ("lr", "weight_decay") if key in adamw} | dict(chosen)
        if self.rest_needs_lr and "lr" not in own:
            raise ValueError(
                f"{self.own}: {self.rest_needs_lr} the learning rate of the matrices does not fit the {len(named)} "
                f"other parameters ({named[0][0]!r}, ...); pass adamw_lr as well, such as 3e-4"
            )
        fields = {key: value for key, value in adamw.items() if key not in ("lr", "weight_decay")}
        settings: Group = {key: value for key, value in common.items() if key not in self.rule().settings()} | own
        return settings | {"params": named, "rule": self.rest.with_settings(**fields)}


class MatrixOptimizer(Optimizer):
    """A matrix rule for hidden matrices and AdamW for the rest, as param groups of one `Optimizer`.

    `optim.group_table` shows which rule steps which parameter. A group that is added later is divided in the same way
    unless it has a `rule`; its own `lr`, `weight_decay` and `adamw_...` apply to it.

    Args:
        parameters: Named parameters, from whose names `optim.roles` infers what a tensor is, or the model, whose module
            types show more. Of a model, the parameters that require a gradient are taken.
        rule: The class of the rule for the matrices, which is created with `fields`.
        lr, weight_decay: Learning rate and decoupled weight decay of the matrices.
        adamw_lr, adamw_weight_decay: Learning rate and weight decay of the rest; `lr` and `weight_decay` by default.
        adamw_betas, adamw_eps, adamw_eps_before_correction: See `AdamWRule`.
        assign: A mapping from part of a name to "matrix", "adamw", or settings of the group (fields of the rule, `lr`,
            `weight_decay`): ``{"conv1": "adamw", "qkv_proj": {"split_sizes": (576, 192, 192)}}``. It takes precedence
            over everything else, and the first part that a name contains wins. Fields of the rule make a tensor a
            matrix; `lr` and `weight_decay` alone do not, and also apply to the bias of the same layer.
        kinds: A mapping from kinds of parameters to settings of the matrix rule for them. AdamW steps all other kinds,
            and the experts of a mixture in one tensor if the rule has no `batched`, unless `assign` says otherwise.
        split_fused: Whether fused matrices (query, key and value; gate and up) are stepped as separate ones where
            `optim.roles` finds their parts. Rules such as SOAP divide tensors only into equal matrices.
        adamw_wrapper: A function that makes the rule of the rest from AdamW's rule.
        adamw_lr_missing: If not empty, the reason why `adamw_lr` must be given, for the error message.
        fields: Fields of the matrix rule.

    Raises:
        ValueError: If there is no matrix, or for a part that no name contains.
        TypeError: For parameters without names, or for an `assign` that is not a mapping.

    Example:
        >>> from optim import MatrixOptimizer, MuonRule
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        >>> optimizer = MatrixOptimizer(model, MuonRule, lr=1e-3, weight_decay=0.1, assign={"1.weight": "adamw"})
        >>> [group["param_names"] for group in optimizer.param_groups]
        [['0.weight'], ['0.bias', '1.weight', '1.bias']]
    """

    def __init__(
        self,
        parameters: NamedParams,
        rule: type[UpdateRule],
        lr: float | Tensor,
        weight_decay: float,
        *,
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_eps_before_correction: bool = False,
        assign: Assign | None = None,
        kinds: Mapping[Kind, Settings] | None = None,
        split_fused: bool = True,
        adamw_wrapper: Callable[[AdamWRule], UpdateRule] | None = None,
        adamw_lr_missing: str = "",
        **fields: Any,
    ) -> None:
        own = type(self).__name__
        check_flag(own, split_fused=split_fused)
        groups = named_groups(parameters, f"{own} finds matrices by name: pass the model or model.named_parameters()")
        names = [name for group in groups for name, _ in group["params"]]
        adamw = AdamWRule(betas=adamw_betas, eps=adamw_eps, eps_before_correction=adamw_eps_before_correction)
        self.divide = Split(
            own=own,
            rule=rule,
            rest=adamw if adamw_wrapper is None else adamw_wrapper(adamw),
            rest_settings={
                key: value
                for key, value in (("lr", adamw_lr), ("weight_decay", adamw_weight_decay))
                if value is not None
            },
            assign=checked_assign(
                own, assign, rule().settings() | {"lr", "weight_decay"}, {"matrix": {}, "adamw": None}, names
            ),
            kinds={"matrix": {}} if kinds is None else kinds,
            told=told_by(parameters),
            rest_needs_lr=adamw_lr_missing,
            split_fused=split_fused,
        )
        super().__init__(groups, rule().with_settings(**fields), lr=lr, weight_decay=weight_decay)
        if not any(isinstance(group["rule"], rule) for group in self.param_groups):
            raise ValueError(f"{own}: none of the parameters is a hidden matrix; use another optimizer, such as AdamW")
