"""The limits of a model: the number of tokens of a row, and the ids of its embedding.

They are read from the model's modules, without its weights. A table of positions has an end; rotary positions do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LONGEST = 1 << 20
"""The maximum number of tokens of a row if the model has no limit."""

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
_FIXED = ("mpt", "reformer")  # their code refuses longer rows, but no table shows the limit


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits of one model; None is no limit."""

    positions: int | None = None
    """The maximum tokens of a row: the size of its table of positions, or (without `table`) its training length."""
    table: bool = False
    """Whether positions come from a table, which has an end; otherwise they are computed (rotary)."""
    vocabulary: int | None = None
    """The rows of the token embedding: only smaller ids exist."""

    def longest(self, asked: int | None) -> int:
        """Return the maximum number of tokens to which a row is encoded.

        Args:
            asked: The setting; None is the limit of the model.
        """
        own = self.positions or LONGEST
        return own if asked is None else min(asked, own) if self.table else asked


def limits_of(model: nn.Module) -> ModelLimits:
    """Return the limits of a model.

    Args:
        model: The model, which may be on the meta device.
    """
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
    """Return the length for which the model was trained, in tokens, according to its configuration; None if unknown.

    Args:
        config: The configuration of the model.
    """
    text = config.get_text_config(decoder=True)
    lengths = (getattr(text, name, None) for name in _LENGTHS)
    return next((n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _first_position(table: Any) -> int:
    """Return the entry of the first token; tables may begin with unused entries or entries for padding."""
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
