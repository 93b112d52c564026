"""The likelihood of each option of a question, and which is the most likely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from datatools import DataError, micro_batches
from pipelines.models.losses import collate, token_losses
from pipelines.rows.chat.refusals import RowError
from pipelines.rows.encode import Encoder
from pipelines.runs import memory
from pipelines.runs.messages import warn
from pipelines.training.accuracy.questions import Question, answered

Variant = tuple[list[int], list[int]]
"""(input_ids, labels) of a question with one of its options as the answer."""


def variants(asked: Question, encoder: Encoder) -> list[Variant]:
    """Encode the question with each option as its answer.

    Args:
        asked: The question.
        encoder: The encoder of rows.

    Raises:
        DataError: An option cannot be encoded; names the row.
    """
    found = []
    for option in asked.options:
        try:
            encoded = encoder(answered(asked.row, option))
        except RowError as error:
            raise DataError(f"{asked.row.file}:{asked.row.line}: the option {option[:60]!r}: {error}") from error
        found.append((encoded.input_ids, encoded.labels))
    return found


def tokens_of(options: Sequence[Variant]) -> int:
    """Count the tokens that go through the model for one question; what its options share counts once.

    Args:
        options: The question with each of its options.
    """
    shared = _shared([ids for ids, _ in options], [_first(labels) for _, labels in options])
    return shared + sum(len(ids) - shared for ids, _ in options)


@torch.inference_mode()
def log_likelihoods(
    model: Any,
    questions: Sequence[Sequence[Variant]],
    *,
    token_budget: int,
    advance: Callable[[int], object] = int,
) -> list[list[tuple[float, int]]]:
    """Return the log-likelihood of each option of each question.

    The end of the turn counts as part of an option, so that one option may begin with another. What the options of a
    question share goes through the model once, where the model keeps a cache that can be repeated; on the longest
    question this is compared with whole rows, and whole rows are used where the numbers differ.

    Args:
        model: A causal language model in evaluation mode.
        questions: The variants of each.
        token_budget: The most padded tokens of a batch of whole rows.
        advance: Called with the number of tokens that are done.

    Returns:
        (sum of log-probabilities, number of tokens) of each option of each question.
    """
    if not questions:
        return []
    cached = _cache_is_right(model, max(questions, key=lambda one: max(len(ids) for ids, _ in one)), token_budget)
    found = []
    for options in questions:
        found.append(_by_cache(model, options) if cached else _by_rows(model, options, token_budget))
        advance(tokens_of(options))
    return found


def _cache_is_right(model: Any, options: Sequence[Variant], token_budget: int) -> bool:
    """Whether a repeated cache gives the numbers of whole rows."""
    want = _by_rows(model, options, token_budget)
    try:
        got = _by_cache(model, options)
    except Exception:  # caches are of many kinds, and not all can be repeated
        return False
    exact = next(model.parameters()).dtype == torch.float32
    near, far = (1e-4, 1e-4) if exact else (2e-2, 0.2)
    if all(abs(a - b) <= far + near * abs(b) for (a, _), (b, _) in zip(got, want, strict=True)):
        return True
    warn(f"{type(model).__name__}: options scored from a cache differ from whole rows; whole rows are used")
    return False


def _by_rows(model: Any, options: Sequence[Variant], token_budget: int) -> list[tuple[float, int]]:
    sums, counts = [0.0] * len(options), [0] * len(options)
    lengths = [len(ids) for ids, _ in options]

    def keep(group: list[int], padded: dict[str, torch.Tensor]) -> None:
        values, where = token_losses(model, {name: t.to(model.device) for name, t in padded.items()})
        for place, value in zip(where.tolist(), values.double().tolist(), strict=True):
            sums[group[place]] -= value
            counts[group[place]] += 1

    batches = micro_batches(lengths, token_budget, lambda group: collate([options[i] for i in group]))
    batches.each(keep, memory.token_budget(token_budget, "options", ""), lambda i: f"option {i + 1} of a question")
    return list(zip(sums, counts, strict=True))


def _by_cache(model: Any, options: Sequence[Variant]) -> list[tuple[float, int]]:
    shared = _shared([ids for ids, _ in options], [_first(labels) for _, labels in options])
    if shared == 0:
        raise ValueError("the options share no token")
    prefix = torch.tensor([options[0][0][:shared]], device=model.device)
    cache = model(input_ids=prefix, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(options))
    tails = collate([(ids[shared:], labels[shared:]) for ids, labels in options])
    ids, labels = (tails[name].to(model.device) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, :-1].float()
    wanted = labels[:, 1:]
    losses = functional.cross_entropy(logits.mT, wanted, ignore_index=-100, reduction="none")
    sums, counts = losses.double().sum(1).tolist(), (wanted != -100).sum(1).tolist()
    return [(-total, count) for total, count in zip(sums, counts, strict=True)]


def _first(labels: Sequence[int]) -> int:
    """The place of the first token with loss that something predicts."""
    return next(t for t, label in enumerate(labels) if label != -100 and t > 0)


def _shared(rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> int:
    """Tokens at the start that all rows have, without the one that predicts the first token with loss."""
    most = min(firsts) - 1
    first = rows[0]
    return next((t for t in range(most) if any(row[t] != first[t] for row in rows)), max(0, most))
