"""What a model can take: how many tokens a row may have, and which ids its embedding holds.

Read from the model's modules, without its weights: a table of positions ends where it ends, rotary positions go on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LONGEST = 1 << 20
"""Most tokens of a row where the model has no limit."""

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "n_ctx",
    "seq_length",
    "context_length",
    "max_sequence_length",
    "model_max_length",
)
_TABLE = re.compile(r"pos|wpe", re.IGNORECASE)
_ELSEWHERE = re.compile("vision|visual|image|audio|speech|whisper", re.IGNORECASE)  # parts that read no text
_FIXED = ("mpt", "reformer")  # whose code refuses longer rows, without a table that shows it


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Of one model; None is no limit."""

    positions: int | None = None
    """Most tokens of a row: entries of its table of positions, or (not `table`) the length it was trained for."""
    table: bool = False
    """Are positions looked up, so that one beyond the last is an error? Else the model computes it (rotary)."""
    vocabulary: int | None = None
    """Rows of the token embedding: the ids below it exist."""

    def longest(self, asked: int | None) -> int:
        """Most tokens that a row is encoded to, if `asked` is the setting (None: what the model takes)."""
        own = self.positions or LONGEST
        return own if asked is None else min(asked, own) if self.table else asked


def limits_of(model: nn.Module) -> ModelLimits:
    """The limits of `model`, which may be on the meta device."""
    from torch import Tensor, nn

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rows = getattr(embedding, "num_embeddings", None)
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    trained = trained_length(config)
    ends = []
    for name, module in model.named_modules():
        if _ELSEWHERE.search(name):
            continue
        leaf = name.rsplit(".", 1)[-1]
        if (
            isinstance(module, nn.Embedding)
            and module is not embedding
            and (_TABLE.search(leaf) or "Position" in type(module).__name__)
        ):
            ends.append(module.num_embeddings - _first_position(module))
        for key, value in {**vars(module), **module._buffers}.items():
            # sines computed once and looked up (GPT-J, CTRL)
            if isinstance(value, Tensor) and re.search("embed_pos|pos_enc", key) and value.ndim >= 2:
                ends.append(value.shape[-2] if value.shape[0] == 1 else value.shape[0])
    if config.model_type in _FIXED and trained:
        ends.append(trained)
    if ends:
        return ModelLimits(min(ends), True, rows)
    if getattr(config, "alibi", False) or not _has_positions(model):
        return ModelLimits(None, False, rows)
    return ModelLimits(trained, False, rows)


def trained_length(config: Any) -> int | None:
    """The tokens of a row for which the model was made, as its configuration says."""
    text = config.get_text_config(decoder=True)
    lengths = (getattr(text, name, None) for name in _LENGTHS)
    return next((n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _first_position(table: Any) -> int:
    """The entry of the first token: tables may begin with a few that are for nothing, or for padding."""
    if type(table).__name__.startswith("ProphetNet"):
        return 2  # padding, and the last token predicts one position further
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _has_positions(model: nn.Module) -> bool:
    return any(
        "rotary" in name.lower() or "rope" in name.lower() or "Rotary" in type(module).__name__
        for name, module in model.named_modules()
    )
