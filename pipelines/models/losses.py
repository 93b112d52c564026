"""Batches of rows and the loss of each row: token ids in, cross-entropy at supervised positions out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from datatools import DataError, covered

Batch = Mapping[str, Tensor]
"""`input_ids` and `labels`, int64 [b, s], padded on the right; labels -100 where there is no loss.

More keys (an `attention_mask` for padding on the left, `position_ids`) are handed to the model as they are."""


def collate(rows: list[tuple[list[int], list[int]]], *, pad: int = 0) -> dict[str, Tensor]:
    """Pad rows to one length.

    The padding token is never attended to and never supervised.

    Args:
        rows: (input_ids, labels) of b rows.
        pad: The id of the padding token.

    Returns:
        A `Batch` of int64 [b, s], where s is the length of the longest row.
    """
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for i, (row, target) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(target)
    return {"input_ids": ids, "labels": labels}


def token_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every supervised token of a batch.

    Args:
        model: A causal language model.
        batch: b rows of s tokens.

    Returns:
        Losses, float32 [n], and the row of each, int64 [n]; n is the number of supervised tokens of the batch.

    Row i's token t is supervised when labels[i, t] != -100; its logits come from position t - 1. The output head sees
    only those n positions, which is exact and, on a small model with a large vocabulary, a fifth of the whole cost:
    a hook narrows the head's input, so that any scaling or soft-capping after the head still happens.
    Padding stands on the right, where a causal model cannot look, so no attention mask is needed.
    """
    labels = batch["labels"][:, 1:]
    wanted = labels != -100
    rows = wanted.nonzero()[:, 0]

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        if hidden.shape[:2] != batch["input_ids"].shape:  # the model narrowed by itself, or has another layout
            raise DataError(f"{type(model).__name__}: its head got {tuple(hidden.shape)}, not one vector per token")
        return (hidden[:, :-1][wanted], *inputs[1:])

    inner = model.module if isinstance(model, DistributedDataParallel) else model
    head = inner.get_output_embeddings()
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    if head is None:  # a model that does not say which layer its head is
        logits = model(**inputs, use_cache=False).logits[:, :-1][wanted]
        return functional.cross_entropy(logits.float(), labels[wanted], reduction="none"), rows
    handle = head.register_forward_pre_hook(narrow)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return functional.cross_entropy(logits.float(), labels[wanted], reduction="none"), rows


def supervised_tokens(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """How many tokens of rows (input_ids, labels) a loss counts: not the first of a row, which nothing predicts."""
    return sum(sum(label != -100 for label in labels[1:]) for _, labels in rows)


def row_losses(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy over the supervised tokens of each row, float32 [b].

    A row without a supervised token has loss 0 and no gradient.
    """
    losses, rows = token_losses(model, batch)
    total = losses.new_zeros(len(batch["labels"])).index_add(0, rows, losses)
    return total / torch.bincount(rows, minlength=len(total)).clamp_min(1)


def dense_row_losses(model: Any, batch: Batch) -> Tensor:
    """`row_losses` with logits at every position, float32 [b].

    torch.func can transform this form, because no shape depends on the data.
    """
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)


def last_states(model: Any, ids: Tensor) -> Tensor:
    """Hidden states of the last layer, [b, s, width].

    The width may differ from the hidden size of the configuration (OPT-350m).

    Args:
        model: A causal language model.
        ids: Token ids, int64 [b, s].

    Raises:
        DataError: The model returns no such states.
    """
    states = None
    if model.base_model is not model:
        states = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    head = model.get_output_embeddings()
    if states is None and head is not None:  # models that do not say which part of them is the decoder (Llama 4)
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        states = seen[-1] if seen else None
    if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:
        raise DataError(
            f"{type(model).__name__} returns no hidden states, one vector per token; use a method that needs none"
        )
    return states


def losses_for(method: str) -> Callable[[Any, Batch], Tensor]:
    """The loss per row in the form that a method of per-example gradients can take."""
    return dense_row_losses if method == "vmap" else row_losses


def seen_parameters(module: Any, params: Mapping[str, Tensor], method: str) -> list[str]:
    """Those of `params` that features are made of, with `method`.

    Of adapters, whatever their kind, all matrices: `hooks` takes a pass per row for those of another kind than plain
    LoRA. Of whole weights, with `hooks`, those of linear layers, without the output head, whose input `token_losses`
    narrows to supervised tokens: a gradient per row of an embedding or a head is as large as the vocabulary.
    """
    if method != "hooks":
        return list(params)
    output = module.get_output_embeddings()
    head = {id(p) for p in output.parameters()} if output is not None else set()
    seen = {name for name in covered(module, list(params)) if id(params[name]) not in head}
    if hasattr(module, "peft_config"):
        seen |= {name for name in params if ".modules_to_save." not in name and ".original_module." not in name}
    return [name for name in params if name in seen]
