"""Learning rates per block of a transformer, as param groups."""

import math
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from optim.param_groups import check_parts, part_in, trained, with_names
from optim.roles import Block, Named, block_of

PAPER_RATIOS: Mapping[Block, float] = MappingProxyType(
    {"embedding": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0, "head": 1.0, "other": 1.0}
)
"""A block's learning rate divided by the base rate. The paper (arXiv 2502.19002) tuned the ratios once, for a Llama of
0.25B parameters, and reused them. Parameters that it does not mention, "other", have the base rate."""

Ratios: TypeAlias = Literal["paper"] | Mapping[str, float]


def blockwise(
    named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    lr: float | Tensor,
    ratios: Ratios = "paper",
    blocks: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return param groups with blockwise learning rates: one group per block, at `lr` times the block's ratio.

        optimizer = AdamW(blockwise(model.named_parameters(), lr=6e-4), betas=(0.9, 0.95), weight_decay=0.1)
        factors = group_factors(optimizer, "blockwise_cosine", total_steps=10_000, warmup_steps=600)

    Args:
        named_parameters: The model or its named parameters.
        lr: The base learning rate.
        ratios: A mapping from block to the factor of `lr`. "paper" is `PAPER_RATIOS`; `optim.diagnostics` measures
            sharpness and proposes others.
        blocks: A mapping from part of a name to block, which takes precedence over `block_of`; the first match wins,
            and the block may be a new one. Parameters that match nothing are in the block "other", at the base rate
            unless `ratios` has it; one UserWarning names them.

    Returns:
        Groups with `lr`, `lr_ratio` (which `group_factors` reads), `block`, and named parameters.

    Raises:
        ValueError: For a parameter whose block has no ratio, by name.
        TypeError: For parameters without names.

    Source:
        arXiv 2502.19002. It runs AdamW and Adam-mini with betas (0.9, 0.95) and decay 0.1, Lion with (0.95, 0.98) and
        1.0, and decays every tensor, including norms. Decoupled decay is scaled by a group's rate as well.

    Differs:
        A tensor that is in no block trains at the base rate, where the AdamW and Lion scripts leave it untrained;
        position embeddings (``wpe``) are embeddings, where the GPT-2 script leaves them at the base rate
        (``blocks={"wpe": "norm"}``).

    Example:
        >>> from optim import blockwise
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4, bias=False), "norm": torch.nn.LayerNorm(4)})
        >>> groups = blockwise(model.named_parameters(), lr=1e-3, ratios={"qk": 2.0, "norm": 1.0})
        >>> [(group["block"], group["lr"]) for group in groups]
        [('qk', 0.002), ('norm', 0.001)]
    """
    if isinstance(named_parameters, nn.Module):
        named_parameters = trained(named_parameters)
    named = with_names(named_parameters, "blockwise learning rates need names: pass model.named_parameters()")
    return Blockwise(ratios, blocks, [name for name, _ in named])({"params": named, "lr": lr})


class Blockwise:
    """A division of param groups by block of a transformer, each at its ratio to the group's rate; see `blockwise`.

    Args:
        ratios: A mapping from block to ratio, or "paper".
        blocks: A mapping from part of a name to block.
        names: Names that are known beforehand, so that one warning names all parameters that are in no block.

    Example:
        >>> from optim import AdamW, Blockwise, divide_groups
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4, bias=False), "norm": torch.nn.LayerNorm(4)})
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3)
        >>> divide_groups(optimizer, Blockwise({"qk": 2.0, "norm": 1.0}, None, []))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.002, 0.001]
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
        """Divide a group by block.

        Args:
            group: A param group with named parameters.

        Returns:
            One group per block, with `lr_ratio` and `block`.

        Raises:
            ValueError: For a parameter whose block has no ratio.
        """
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
    """Warn once about parameters whose names do not indicate a block of a transformer and that nothing else assigns.

    Args:
        names: The names of all parameters.
        chosen: The parts of names that were assigned explicitly.
        fate: What happens to these parameters, as the end of a sentence with the subject "they".
        remedy: The setting that changes it, with the field `part` for a part of a name.
    """
    names, chosen = list(names), list(chosen)
    strangers = [name for name in names if block_of(name) == "other" and part_in(name, chosen) is None]
    if strangers:
        last = [part for part in strangers[0].split(".") if part not in ("weight", "bias") and not part.isdigit()]
        some = ", ".join(map(repr, strangers[:3])) + (", ..." if len(strangers) > 3 else "")
        warnings.warn(
            f"the names of {len(strangers)} of {len(names)} parameters do not show which block of a transformer they "
            f"are in ({some}): they {fate}; to change this, pass {remedy.format(part=(last or strangers[:1])[-1])}",
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
    """Return matrices without data, one per kind of block (that has a ratio), on which settings can be tried.

    Each side is 5040, a number that is divisible by almost every number of blocks.

    Args:
        ratios: A mapping from block to ratio, as in `blockwise`.

    Returns:
        Named parameters on the meta device.

    Example:
        >>> from optim import create, example_parameters
        >>> create("muon", example_parameters(), lr=0.02).param_groups[0]["rule"].name
        'muon'
    """
    chosen = [block for block in _EXAMPLES if not isinstance(ratios, Mapping) or block in ratios] or ["ffn"]
    return [(f"{_EXAMPLES[block]}.weight", nn.Parameter(torch.empty(5040, 5040, device="meta"))) for block in chosen]
