"""What the rules for matrices share: which matrices are in a tensor, and the class that gives the rest to AdamW."""

import math
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from optim import stacks
from optim.optimizer import Optimizer
from optim.param_groups import is_matrix, layouts, with_names
from optim.rule import State, UpdateRule, check_flag, zero_step
from optim.rules.adamw import AdamWRule

Settings: TypeAlias = Mapping[str, Any]
Place: TypeAlias = Callable[[str, Tensor], Settings | None]


@dataclass(frozen=True, kw_only=True)
class MatrixRule(UpdateRule, ABC):
    """A rule for matrices [m, n], m outputs and n inputs as in `torch.nn.Linear`; not elementwise.

    Tensors of more dimensions are seen as [dim 0, rest]. Other layouts are fields, which `MatrixOptimizer` sets where
    names and shapes tell:

    - `transposed`: the parameter is [inputs, outputs], as in GPT-2's Conv1D.
    - `batched`: a tensor of three dimensions is a stack of matrices, as the experts of a mixture are.
    - `split_sizes`: the rows are several matrices, (q, k, v) in one say, of that many rows each; the step is that of
      separate parameters. The published codes take such a matrix as one.
    - `num_heads`: the rows are that many matrices of equal size. Not with `split_sizes`.
    """

    elementwise: ClassVar[bool] = False

    transposed: bool = False
    batched: bool = False
    split_sizes: tuple[int, ...] | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_flag(name, transposed=self.transposed, batched=self.batched)
        if self.split_sizes is not None:
            sizes = self.split_sizes
            if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes or not all(map(_is_count, sizes)):
                raise ValueError(f"{name}: split_sizes = {sizes!r}; expected numbers of rows, such as (576, 192, 192)")
            object.__setattr__(self, "split_sizes", tuple(sizes))
        if self.num_heads is not None and not _is_count(self.num_heads):
            raise ValueError(f"{name}: num_heads = {self.num_heads!r}; it must be an integer of at least 1")
        if self.num_heads is not None and self.split_sizes is not None:
            raise ValueError(f"{name}: split_sizes and num_heads both divide the rows; give one of them")

    def init(self, param: Tensor) -> State:
        """A step count; ValueError for a vector or scalar. Rules with more of a state add to it."""
        self.check_layout(param)
        return {"step": zero_step()}

    def check_layout(self, param: Tensor) -> None:
        """ValueError for a tensor that is no matrix, or does not fit the fields above."""
        name, shape = type(self).__name__, tuple(param.shape)
        if param.ndim < 2:
            raise ValueError(
                f"{name}: a parameter of shape {shape} is no matrix; give it another rule "
                f"(create({self.name!r}, model.named_parameters(), ...) puts it in an AdamW group)"
            )
        if self.batched and param.ndim != 3:
            raise ValueError(f"{name}: batched is for tensors of three dimensions; a parameter has shape {shape}")
        if self.transposed and param.ndim != (3 if self.batched else 2):
            raise ValueError(f"{name}: transposed is for matrices; a parameter has shape {shape}")
        rows = shape[-1] if self.transposed else shape[1 if self.batched else 0]
        if self.split_sizes is not None and sum(self.split_sizes) != rows:
            raise ValueError(f"{name}: split_sizes {self.split_sizes} of {rows} rows, in a parameter of shape {shape}")
        if self.num_heads is not None and rows % self.num_heads:
            raise ValueError(f"{name}: {rows} rows are no {self.num_heads} heads, in a parameter of shape {shape}")

    def step_all(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """`step` of all of them, those of one shape together."""
        stacks.step(self, params, grads, states, lr=lr, weight_decay=weight_decay)

    def stacks(self, x: Tensor) -> list[Tensor]:
        """The matrices in x, a tensor of the parameter's layout, as stacks [k, m, n]: one but for `split_sizes`."""
        lead = x.shape[:2] if self.batched else (1, x.shape[0])
        y = x.reshape(*lead, math.prod(x.shape[2 if self.batched else 1 :]))
        if self.transposed:
            y = y.mT
        if self.num_heads:
            y = y.reshape(y.shape[0] * self.num_heads, y.shape[1] // self.num_heads, y.shape[2])
        return list(torch.split(y, list(self.split_sizes), dim=1)) if self.split_sizes else [y]

    def joined(self, stacks: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of `stacks`: a tensor of that shape."""
        y = torch.cat(list(stacks), dim=1) if len(stacks) > 1 else stacks[0]
        if self.num_heads:
            y = y.reshape(y.shape[0] // self.num_heads, y.shape[1] * self.num_heads, y.shape[2])
        return (y.mT if self.transposed else y).reshape(tuple(shape))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class MatrixOptimizer(Optimizer):
    """Hidden matrices by a rule for matrices, the rest by AdamW: param groups of one `Optimizer`.

    named_parameters: with names, by which `optim.param_groups` tells what a tensor is; `optim.group_table` shows it.
    rule: of the matrices, with `fields`. lr, weight_decay: of their groups.
    adamw_lr, adamw_weight_decay, adamw_betas, adamw_eps: of the rest; `lr` and `weight_decay` unless given.
    assign: part of a name -> "matrix", "adamw", or settings of the group (fields of the rule, `lr`, `weight_decay`):
    ``{"conv1": "adamw", "qkv_proj": {"split_sizes": (576, 192, 192)}}``. Looked at before everything else; the first
    part that a name holds wins.
    place: (name, tensor) -> settings of the matrix rule, or None for AdamW; not asked of a mixture's experts in one
    tensor if the rule has no `batched`: they go to AdamW, unless assigned.
    Raises: ValueError if there is no matrix, or for a part of a name that no tensor has; TypeError without names, or
    for an `assign` that is no mapping.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        rule: type[UpdateRule],
        lr: float | Tensor,
        weight_decay: float,
        *,
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        assign: Mapping[str, str | Settings] | None = None,
        place: Place = lambda name, param: {} if is_matrix(name, param) else None,
        **fields: Any,
    ) -> None:
        own = type(self).__name__
        named = with_names(named_parameters, f"{own} tells matrices by name: pass model.named_parameters()")
        rest: list[tuple[str, Tensor]] = []
        matrices: dict[str, dict[str, Any]] = {}
        found = layouts(named)
        chosen = _assigned(own, rule, named, assign or {})
        known = rule().settings()
        for name, param in named:
            layout = found.get(name, {})
            if name in chosen:
                settings = chosen[name]
            elif layout.get("batched") and "batched" not in known:
                settings = None  # a stack of matrices, which the rule would take for one
            else:
                settings = place(name, param)
            if settings is None:
                rest.append((name, param))
            else:
                settings = {key: value for key, value in layout.items() if key in known} | dict(settings)
                matrices.setdefault(repr(settings), settings | {"params": []})["params"].append((name, param))
        if not matrices:
            raise ValueError(f"{own}: none of the parameters is a hidden matrix; use another optimizer, such as AdamW")
        groups = list(matrices.values())
        if rest:
            groups.append(
                {
                    "params": rest,
                    "rule": AdamWRule(betas=adamw_betas, eps=adamw_eps),
                    "lr": lr if adamw_lr is None else adamw_lr,
                    "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
                }
            )
        super().__init__(groups, rule().with_settings(**fields), lr=lr, weight_decay=weight_decay)


def _assigned(
    own: str, rule: type[UpdateRule], named: Sequence[tuple[str, Tensor]], assign: Mapping[str, str | Settings]
) -> dict[str, Settings | None]:
    """name -> what `assign` says of it: None for AdamW, otherwise settings."""
    if not isinstance(assign, Mapping):
        raise TypeError(f"{own}: assign = {assign!r}; expected a mapping such as {{'lm_head': 'adamw'}}")
    known = rule().settings() | {"lr", "weight_decay"}
    meant: dict[str, Settings | None] = {}
    for part, choice in assign.items():
        if choice in ("matrix", "adamw"):
            meant[part] = {} if choice == "matrix" else None
        elif isinstance(choice, Mapping) and set(choice) <= known:
            meant[part] = choice
        else:
            raise ValueError(
                f"{own}: assign[{part!r}] = {choice!r}; expected 'matrix', 'adamw' or settings out of "
                + ", ".join(sorted(known))
            )
        if not any(part in name for name, _ in named):
            raise ValueError(f"{own}: assign names {part!r}, which is in the name of no parameter")
    return {
        name: next(choice for part, choice in meant.items() if part in name)
        for name, _ in named
        if any(part in name for part in meant)
    }
