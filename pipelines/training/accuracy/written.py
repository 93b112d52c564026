"""What a model writes for each question: prompts, where an answer ends, and the generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipelines.models.limits import ModelLimits
from pipelines.rows.encode import Encoder
from pipelines.settings.metrics import MetricsConfig
from pipelines.training.accuracy.generate import greedy
from pipelines.training.accuracy.questions import Question

_SHORTEST = 16


class Writer:
    """Generation for a fixed list of questions.

    Args:
        asked: The questions; with `generate_rows` only so many of them are kept, drawn by the seed 0.
        encoder: How rows are encoded.
        tokenizer: The tokenizer of the model.
        limits: How many tokens the model takes.
        config: The settings.

    Attributes:
        asked: The questions that are written for.
        longest: The most tokens of an answer.
    """

    def __init__(
        self, asked: Sequence[Question], encoder: Encoder, tokenizer: Any, limits: ModelLimits, config: MetricsConfig
    ) -> None:
        self.asked = _drawn(asked, config.generate_rows)
        self._encoder, self._tokenizer, self._config = encoder, tokenizer, config
        self._positions = limits.positions if limits.table else None
        self._prompts: list[list[int]] = []
        self._ends: set[int] = set()
        self._tail = ""
        longest = 0
        for one in self.asked:
            encoded = encoder(one.row)
            first = next(t for t, label in enumerate(encoded.labels) if label != -100 and t > 0)
            said = [label for label in encoded.labels[first:] if label != -100]
            self._prompts.append(encoded.input_ids[:first])
            self._ends |= {token for token in said if token in encoder.control_ids}
            longest = max(longest, len(said))
            if not self._tail:
                self._tail = tokenizer.decode(said, skip_special_tokens=True).rpartition(one.turn.strip())[2].strip()
        self.longest = config.max_new_tokens or max(_SHORTEST, math.ceil(1.25 * longest))

    @property
    def tokens(self) -> int:
        """Tokens of the prompts."""
        return sum(map(len, self._prompts))

    @property
    def batches(self) -> int:
        """About how many batches there are."""
        each = max(1, self._config.generate_tokens // (max(map(len, self._prompts), default=1) + self.longest))
        return -(-len(self._prompts) // each)

    def write(self, model: Any, advance: Callable[[int], object] = int) -> list[str]:
        """Return the text that the model writes for each question, without special tokens or what follows an answer.

        Args:
            model: The model.
            advance: Called with the number of questions that are done.
        """
        pad = self._tokenizer.pad_token_id
        stops = self._ends | _ends_of(self._tokenizer, model)
        made = greedy(
            model,
            self._prompts,
            longest=self.longest,
            stops=sorted(stops),
            pad=pad if pad is not None else min(stops, default=0),
            token_budget=self._config.generate_tokens,
            positions=self._positions,
            advance=advance,
        )
        return [self._until_tail(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]

    def _until_tail(self, text: str) -> str:
        return text.partition(self._tail)[0] if self._tail else text


def _drawn(asked: Sequence[Question], many: int | None) -> list[Question]:
    if many is None or many >= len(asked):
        return list(asked)
    places = np.random.default_rng(0).choice(len(asked), many, replace=False)
    return [asked[i] for i in sorted(places.tolist())]


def _ends_of(tokenizer: Any, model: Any) -> set[int]:
    """The tokens that end a text, by the tokenizer and by the model's own settings."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None)):
        found |= set(value if isinstance(value, list) else [] if value is None else [value])
    return found
