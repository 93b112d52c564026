"""Adam-mini: Adam with one second moment a block of a tensor: a head, a row, or the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from optim.checks import check_non_negative, checked_betas
from optim.optimizer import Group, Optimizer
from optim.param_groups import NamedParams, check_parts, named_groups, part_in, told_by, warn_of_strangers, with_names
from optim.roles import BLOCKS, Role, block_of, is_bias, roles
from optim.rule import State, UpdateRule, correction, moment_dtype, zero_moment, zero_step
from optim.saved import bare_name

Blocks: TypeAlias = str | int | Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class AdamMiniRule(UpdateRule):
    """u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps), with m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) q;
    q is the mean of g^2 over each block, and v has one entry a block.

    - `blocks`: "tensor", the whole; "row", each index of dimension 0; "element", plain Adam; or an integer, as many
      consecutive entries, which must divide the tensor: a head of a query or key matrix is head_dim rows, so
      head_dim * columns entries. `AdamMini` chooses by name.

    Shapes: any; a vector or scalar has one row. Not elementwise.
    State: 4 bytes a parameter (a float32 moment), 4 a block, and a step count.
    Source: Zhang et al. 2024, arXiv 2406.16793, algorithm 1; zyushun/Adam-mini, adam_mini 1.1.1.
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
        """Entries of a block."""
        if isinstance(self.blocks, int):
            return self.blocks
        if self.blocks == "element":
            return 1
        rows = param.shape[0] if self.blocks == "row" and param.ndim > 1 else 1
        return max(param.numel() // max(rows, 1), 1)

    def init(self, param: Tensor) -> State:
        """A zero moment, a zero a block, and a step count.

        Raises: ValueError if blocks of the given size do not divide the tensor.
        """
        size, count = self._size(param), param.numel()
        if count % size:
            raise ValueError(
                f"AdamMiniRule: blocks of {size} entries do not divide a tensor of shape {tuple(param.shape)}"
            )
        shape = () if count <= size else param.shape if size == 1 else (count // size,)
        v = param.new_zeros(shape, dtype=moment_dtype(param), requires_grad=False)
        return {"step": zero_step(), "exp_avg": zero_moment(param), "exp_avg_sq": v}

    def update(self, grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        """The direction u of the class docstring, in the moments' dtype."""
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
    """`Optimizer` running `AdamMiniRule`, the blocks of each parameter chosen by its name.

    One v for each entry of a bias; for each head of a query or key matrix; for each row (a token, an output) of
    embeddings, heads, value, output and feed-forward matrices, of query, key and value in one matrix, of each expert in
    a tensor of many, and of LoRA's A and B wherever they are; for the whole of a norm or any other vector. Which is
    which is told by `optim.roles.block_of`. Norms and biases have no weight decay.

    A name that tells no block has the finest v that costs little: one for each row of a matrix, and one for each entry
    of what is none (attention sinks, `A_log`, depthwise convolutions); one UserWarning names them.

    params: the model, named parameters, or param groups of them (whose `lr`, `weight_decay`, ... are kept).
    head_dim: how many rows of a query or key matrix are a head; also where there are fewer key heads.
    dim, n_heads: of the model; dim / n_heads stands for a missing head_dim, but is not it in Qwen3 and Gemma. Without
    these too, and for matrices with a number of rows that is no multiple of it, query and key have one v a row.
    whole_value: one v for each whole value matrix, as the authors advise for runs below about 10,000 steps.
    blocks: the same for all parameters, whatever their names; weight decay then acts on all. Or part of a name ->
    blocks as in `AdamMiniRule`, or a block of a transformer ("qk", "ffn", ...), looked at before `block_of`.
    Raises: TypeError for parameters without names; ValueError for `blocks` that are none.
    Differs:

    - The published code gives unknown names one v a tensor, silently; assumes 32 heads and 2048 dimensions; and fails
      on vectors in a place of matrices (`mlp.norm.weight`).
    - It knows no query, key and value in one matrix: `qkv_proj` has one v a row there too, but `query_key_value` and
      `wqkv` have one for as many entries as a query's head has, and `c_attn` and `in_proj_weight` one for all.
    - It knows no LoRA: A and B are divided as the matrix whose name they bear.
    - Not here: `n_kv_heads` (which chooses no blocks there either), `verbose`, and the lists of name parts
      (`wv_names`, ...) that are changed after construction; `whole_value` and `blocks` stand for these.

    Matrices with their inputs first (Hugging Face's GPT-2, GPT-OSS's experts) have inputs as rows.
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
        warn_of_strangers(names, self.divide.blocks, "have a second moment a row or an entry",
                          "blocks={{{part!r}: 'tensor'}}")  # fmt: skip
        super().__init__(groups, rule, lr=lr, weight_decay=weight_decay)


_NAMELESS = "AdamMini chooses blocks by name: pass model.named_parameters(), or `blocks` for all"


def _checked(blocks: Blocks | None) -> dict[str, str | int]:
    if blocks is None:
        return {}
    if not isinstance(blocks, Mapping):
        raise TypeError(f"AdamMini: blocks = {blocks!r}; expected blocks such as 'row', or part of a name -> blocks")
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
        if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(f"AdamMini: head_dim = {head_dim!r}; it must be an integer above 0")
        return head_dim
    if dim is None and n_heads is None:
        return None
    if not (isinstance(dim, int) and isinstance(n_heads, int) and dim > 0 and n_heads > 0 and dim % n_heads == 0):
        raise ValueError(f"AdamMini: dim = {dim!r}, n_heads = {n_heads!r}; give both, with dim a multiple of n_heads")
    return dim // n_heads


@dataclass(frozen=True)
class ByName:
    """How `AdamMini` divides a group of named parameters; also one that is added later."""

    head_dim: int | None
    whole_value: bool
    blocks: Mapping[str, str | int]
    told: Mapping[str, Role]

    def __call__(self, group: Group, optimizer: Optimizer) -> list[Group]:
        """Groups of like blocks and like weight decay, each with the rest of the group's settings."""
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
        """(blocks, whether weight decay acts on it)."""
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
