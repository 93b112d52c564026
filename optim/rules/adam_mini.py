"""Adam-mini: Adam with one second moment per block of a tensor: a head, a row, or the whole tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from optim.block_rates import warn_of_strangers
from optim.checks import check_non_negative, check_positive_counts, checked_betas
from optim.moments import correction, moment_dtype, zero_moment, zero_step
from optim.optimizer import Group, Optimizer
from optim.param_groups import NamedParams, check_parts, named_groups, part_in, told_by, with_names
from optim.roles import BLOCKS, Role, block_of, is_bias, roles
from optim.rule import OfParam, State, UpdateRule
from optim.saved import bare_name

Blocks: TypeAlias = str | int | Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class AdamMiniRule(UpdateRule):
    """Adam-mini: Adam with one second moment per block of a tensor.

        u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Here m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) q, where q is the mean of g^2 over each block; v has one entry
    per block.

    Args:
        betas: (b1, b2), the decay rates of the two moments.
        eps: Added to the denominator.
        blocks: "tensor" makes the whole tensor one block, "row" each index of dimension 0, and "element" each entry
            (plain Adam). An integer makes blocks of that many consecutive entries, and must divide the number of
            entries: a head of a query or key matrix has head_dim rows and therefore head_dim * columns entries.
            `AdamMini` chooses the blocks by the parameter's name.

    Shapes:
        Any; a vector or scalar has one row. Not elementwise.

    State:
        4 bytes per parameter (a float32 moment), 4 bytes per block, and a step count.

    Source:
        Zhang et al. 2024, arXiv 2406.16793, algorithm 1; zyushun/Adam-mini, adam_mini 1.1.1.
    """

    name: ClassVar[str] = "adam_mini"
    elementwise: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    blocks: str | int = "tensor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas("AdamMiniRule", self.betas))
        check_non_negative("AdamMiniRule", eps=self.eps)
        size = isinstance(self.blocks, int) and not isinstance(self.blocks, bool) and self.blocks > 0
        if self.blocks not in ("tensor", "row", "element") and not size:
            raise ValueError(
                f"AdamMiniRule: blocks = {self.blocks!r}; it must be 'tensor', 'row', 'element' or an integer above 0"
            )

    def _size(self, param: Tensor) -> int:
        """Return the number of entries in a block."""
        if isinstance(self.blocks, int):
            return self.blocks
        if self.blocks == "element":
            return 1
        rows = param.shape[0] if self.blocks == "row" and param.ndim > 1 else 1
        return max(param.numel() // max(rows, 1), 1)

    def init(self, param: OfParam) -> State:
        """Return a zero first moment, a zero second moment per block, and a zero step count.

        Raises:
            ValueError: If blocks of the given size do not divide the tensor.
        """
        size, count = self._size(param), param.numel()
        if count % size:
            raise ValueError(
                f"AdamMiniRule: blocks of {size} entries do not divide a tensor of shape {tuple(param.shape)}"
            )
        shape = () if count <= size else param.shape if size == 1 else (count // size,)
        v = param.new_zeros(shape, dtype=moment_dtype(param), requires_grad=False)
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": v}

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the direction u of the class docstring, in the moments' dtype, and the new state."""
        b1, b2 = self.betas
        g = grad.to(state["exp_avg"].dtype)
        t = state["step"] + 1
        m = state["exp_avg"].lerp(g, 1 - b1)
        size, count = self._size(param), param.numel()
        rows = size > 1 and count > size
        if rows:
            q = g.square().reshape(-1, size).mean(1)
        else:
            q = g.square().sum() / max(count, 1) if count <= size else g.square()
        v = b2 * state["exp_avg_sq"] + (1 - b2) * q
        m_hat = m / correction(b1, t).to(m.dtype)
        root = (v / correction(b2, t).to(m.dtype)).sqrt() + self.eps
        direction = (m_hat.reshape(-1, size) / root.unsqueeze(1)).reshape(param.shape) if rows else m_hat / root
        return direction, {"step": t, "exp_avg": m, "exp_avg_sq": v}


class AdamMini(Optimizer):
    """Adam-mini for all parameters, with the blocks of each parameter chosen by its name.

    There is one second moment v

    - per entry of a bias;
    - per head of a query or key matrix;
    - per row (a token or an output) of embeddings, heads, value, output and feed-forward matrices, of matrices that
      contain query, key and value, of each expert in a tensor of several experts, and of LoRA's A and B in any layer;
    - per tensor for norms and all other vectors.

    `optim.roles.block_of` determines the kind. Norms and biases have no weight decay. A parameter whose name does not
    indicate its kind has the finest v that is still inexpensive: one per row of a matrix, and one per entry of anything
    else (attention sinks, `A_log`, depthwise convolutions). One UserWarning names these parameters. In matrices with
    inputs as their first dimension (Hugging Face's GPT-2, GPT-OSS's experts), a row is an input.

    Args:
        params: The model, named parameters, or param groups of named parameters, whose `lr`, `weight_decay` and other
            settings are kept.
        lr: Learning rate.
        betas, eps: See `AdamMiniRule`.
        weight_decay: Decoupled weight decay.
        dim, n_heads: Width and number of heads of the model. Their quotient replaces a missing `head_dim`, but is wrong
            for Qwen3 and Gemma.
        head_dim: The number of rows of a query or key matrix that form a head; it is the same if there are fewer key
            heads. Without it (and without `dim` and `n_heads`), and for matrices whose number of rows is not a multiple
            of it, query and key have one v per row.
        whole_value: Whether each value matrix has a single v, which the authors recommend for runs of fewer than about
            10,000 steps.
        blocks: Blocks for all parameters regardless of their names, in which case weight decay applies to all of them.
            Or a mapping from part of a name to blocks as in `AdamMiniRule` or to a block of a transformer ("qk", "ffn",
            ...), which takes precedence over `block_of`.

    Raises:
        TypeError: For parameters without names.
        ValueError: For `blocks` that do not exist.

    Differs:
        - The published code silently gives unknown names one v per tensor, assumes 32 heads and 2048 dimensions, and
          fails on vectors where it expects matrices (`mlp.norm.weight`).
        - The published code does not recognise query, key and value in one matrix: `qkv_proj` has one v per row there
          too, but `query_key_value` and `wqkv` have blocks of as many entries as a query head has, and `c_attn` and
          `in_proj_weight` have a single v.
        - The published code does not recognise LoRA: A and B are divided like the matrix whose name they contain.
        - `n_kv_heads` (which has no effect on blocks in the published code), `verbose`, and the lists of name parts
          that are changed after construction (`wv_names`, ...) do not exist here; use `whole_value` and `blocks`.

    Example:
        >>> import torch
        >>> from optim import AdamMini
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = AdamMini(model.named_parameters(), lr=1e-3, head_dim=4)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: NamedParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        dim: int | None = None,
        n_heads: int | None = None,
        head_dim: int | None = None,
        whole_value: bool = False,
        blocks: Blocks | None = None,
    ) -> None:
        uniform = blocks if isinstance(blocks, str | int) else None
        rule = AdamMiniRule(betas=betas, eps=eps, blocks="tensor" if uniform is None else uniform)
        head = _head_dim(dim, n_heads, head_dim)
        if uniform is not None:
            super().__init__(params, rule, lr=lr, weight_decay=weight_decay)
            return
        groups = named_groups(params, _NAMELESS)
        self.divide = ByName(head, whole_value, _checked(blocks), told_by(params))
        names = [name for group in groups for name, _ in group["params"]]
        check_parts("AdamMini: blocks", self.divide.blocks, names)
        warn_of_strangers(names, self.divide.blocks, "have one second moment per row or per entry",
                          "blocks={{{part!r}: 'tensor'}}")  # fmt: skip
        super().__init__(groups, rule, lr=lr, weight_decay=weight_decay)


_NAMELESS = "AdamMini chooses blocks by name: pass model.named_parameters(), or `blocks` for all parameters"


def _checked(blocks: Blocks | None) -> dict[str, str | int]:
    if blocks is None:
        return {}
    if not isinstance(blocks, Mapping):
        raise TypeError(
            f"AdamMini: blocks = {blocks!r}; expected blocks such as 'row', or a mapping from part of a name to blocks"
        )
    for part, chosen in blocks.items():
        if chosen not in BLOCKS:
            try:
                AdamMiniRule(blocks=chosen)
            except ValueError:
                raise ValueError(
                    f"AdamMini: blocks[{part!r}] = {chosen!r}; it must be 'tensor', 'row', 'element', an integer above "
                    f"0, or a block of a transformer: {', '.join(BLOCKS)}"
                ) from None
    return dict(blocks)


def _head_dim(dim: int | None, n_heads: int | None, head_dim: int | None) -> int | None:
    if head_dim is not None:
        check_positive_counts("AdamMini", head_dim=head_dim)
        return head_dim
    if dim is None and n_heads is None:
        return None
    if not (isinstance(dim, int) and isinstance(n_heads, int) and dim > 0 and n_heads > 0 and dim % n_heads == 0):
        raise ValueError(f"AdamMini: dim = {dim!r}, n_heads = {n_heads!r}; give both, with dim a multiple of n_heads")
    return dim // n_heads


@dataclass(frozen=True)
class ByName:
    """The way in which `AdamMini` divides a group of named parameters, at construction and when a group is added later.

    Args:
        head_dim: The number of rows of a head, if it is known.
        whole_value: Whether each value matrix has a single v.
        blocks: A mapping from part of a name to blocks.
        told: The roles that the model's module types assign to parameters, by name.
    """

    head_dim: int | None
    whole_value: bool
    blocks: Mapping[str, str | int]
    told: Mapping[str, Role]

    def __call__(self, group: Group, optimizer: Optimizer) -> list[Group]:
        """Divide a group by blocks and weight decay.

        Args:
            group: A param group with named parameters.
            optimizer: The optimizer that the group is added to.

        Returns:
            Groups with equal blocks and equal weight decay, each with the remaining settings of the group.
        """
        if "rule" in group or "blocks" in group:
            return [group]
        parts: dict[tuple[str | int, bool], list[tuple[str, Tensor]]] = {}
        named = with_names(group["params"], _NAMELESS)
        found = roles(named)
        for name, param in named:
            of = self._of(name, param, self.told.get(bare_name(name), found[name]))
            parts.setdefault(of, []).append((name, param))
        rest = {key: value for key, value in group.items() if key != "params"}
        return [
            rest | {"params": part, "blocks": blocks} | ({} if decays else {"weight_decay": 0.0})
            for (blocks, decays), part in parts.items()
        ]

    def _of(self, name: str, param: Tensor, role: Role) -> tuple[str | int, bool]:
        """Return the blocks of a parameter, and whether it has weight decay."""
        part = part_in(name, self.blocks)
        chosen = block_of(name) if part is None else self.blocks[part]
        bias = is_bias(name)
        decays = not bias and chosen != "norm"
        if chosen not in BLOCKS:
            return chosen, decays
        if bias:
            return "element", decays
        if chosen == "other" and role.kind == "other":
            return "element", decays
        if param.ndim < 2 or chosen == "norm":
            return "tensor", decays
        if role.layout.get("batched") is True:
            return param.shape[-1], decays
        parts = set(name.lower().split("."))
        if parts & _LORA:
            return "row", decays
        if chosen == "qk" and self.head_dim and param.shape[0] % self.head_dim == 0:
            return self.head_dim * (param.numel() // param.shape[0]), decays
        whole = self.whole_value and parts & {"v_proj", "v_attn", "v_lin", "value", "wv"}
        return ("tensor" if whole else "row"), decays


_LORA = {"lora_a", "lora_b", "lora_embedding_a", "lora_embedding_b"}
