"""Greedy generation in batches: the same tokens as one prompt at a time without a cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.models.quiet import quiet
from pipelines.runs.messages import warn

WAYS = ("padded batches with a cache", "batches of one length with a cache", "one prompt at a time and no cache")
"""From the fastest to the safest. A model whose tokens differ from what whole rows give is taken down to the next."""


@torch.inference_mode()
def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    longest: int,
    stops: Sequence[int],
    pad: int,
    token_budget: int,
    positions: int | None = None,
    advance: Callable[[int], object] = int,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, token by token.

    Prompts are padded on the left to the length of their batch. In each batch the continuation with the most padding is
    compared with one pass over its whole row, without padding and without a cache: where a token is not the most likely
    one there, the batch is generated again in the next of `WAYS`, and so are all that follow.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids; none is empty.
        longest: The most new tokens.
        stops: Tokens that end a continuation; they are not part of it.
        pad: The id of the padding token, which is never attended to.
        token_budget: The most tokens of a batch, new ones included.
        positions: The most tokens of a row that the model takes; None is no limit.
        advance: Called with the number of prompts that are done.

    Returns:
        The new tokens of each prompt. A prompt that leaves no position free has none.
    """
    found: list[list[int]] = [[] for _ in prompts]
    way = 0
    waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while waiting:
        group, room = _next_batch(prompts, waiting, way, longest, token_budget, positions)
        if room > 0:
            rows = [prompts[i] for i in group]
            if way < 2 and (made := _batch(model, rows, room, stops, pad)) is None:
                way += 1
                warn(
                    f"{type(model).__name__}: generated in {WAYS[way - 1]}, tokens are not those of whole rows; "
                    f"generating with {WAYS[way]}, which takes longer"
                )
                continue
            if way == 2:
                made = [_alone(model, row, room, stops) for row in rows]
            for i, tokens in zip(group, made or (), strict=True):
                found[i] = tokens
        waiting = waiting[len(group) :]
        advance(len(group))
    return found


def _next_batch(
    prompts: Sequence[Sequence[int]],
    waiting: Sequence[int],
    way: int,
    longest: int,
    token_budget: int,
    positions: int | None,
) -> tuple[list[int], int]:
    """The first of those that wait, longest first, and how many new tokens there is room for."""
    length = len(prompts[waiting[0]])
    room = longest if positions is None else min(longest, positions - length)
    many = 1 if way == 2 or room <= 0 else max(1, token_budget // (length + room))
    group = list(waiting[:many])
    if way == 1:
        group = [i for i in group if len(prompts[i]) == length]
    if positions is not None and room < longest:  # shorter prompts have more room
        group = [i for i in group if len(prompts[i]) == length]
    return group, room


def _batch(
    model: Any, rows: Sequence[Sequence[int]], room: int, stops: Sequence[int], pad: int
) -> list[list[int]] | None:
    """New tokens of a batch by transformers; None where they are not those of whole rows."""
    try:
        made = _generate(model, rows, room, stops, pad)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever the code of a model raises when it cannot do this: the next way may
        return None
    return made if _agrees(model, rows[-1], made[-1], stops, room) else None


def _alone(model: Any, prompt: Sequence[int], room: int, stops: Sequence[int]) -> list[int]:
    """New tokens by the definition: one pass over the whole row for each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + room:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        if (token := int(logits.argmax())) in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _generate(model: Any, rows: Sequence[Sequence[int]], room: int, stops: Sequence[int], pad: int) -> list[list[int]]:
    from transformers import GenerationConfig

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
    )
    with quiet(), _own_settings(model, config), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    return [_until(row, stops) for row in made[:, width:].tolist()]


@contextmanager
def _own_settings(model: Any, config: Any) -> Iterator[None]:
    """Inside, the model's own generation settings (sampling, penalties, forced tokens) fill no gap of ours."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(base, "generation_config", None)
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = before


def _until(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    return list(tokens[: next((t for t, token in enumerate(tokens) if token in stops), len(tokens))])


def _agrees(model: Any, prompt: Sequence[int], made: Sequence[int], stops: Sequence[int], room: int) -> bool:
    """Whether each new token is the most likely one (up to rounding) in one pass over the whole row.

    The end counts too: a continuation that is shorter than the room for it must have stopped for a reason.
    """
    ids = torch.tensor([[*prompt, *made]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    near = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    best = logits.max(1).values
    slack = near * (1 + best.abs())
    chosen = logits[:-1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    if bool((chosen < best[:-1] - slack[:-1]).any()):
        return False
    if len(made) == room or not stops:
        return True
    return bool(logits[-1, list(stops)].max() >= best[-1] - slack[-1])
