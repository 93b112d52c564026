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
"""`input_ids` and `labels`, int64 [b, s], padded on the right; labels are -100 where there is no loss.

Other keys (an `attention_mask` for padding on the left, `position_ids`) are passed to the model unchanged."""


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
    """Return the cross-entropy of every supervised token of a batch.

    Row i's token t is supervised if labels[i, t] != -100; its logits come from position t - 1. The output head gets
    only these n positions. This is exact and, on a small model with a large vocabulary, saves a fifth of the whole
    cost. A hook narrows the head's input, so that scaling or soft-capping after the head still takes place. Padding is
    on the right, where a causal model does not look, so that no attention mask is needed.

    Args:
        model: A causal language model.
        batch: b rows of s tokens.

    Returns:
        Losses, float32 [n], and the row of each, int64 [n]; n is the number of supervised tokens of the batch.
    """
    labels = batch["labels"][:, 1:]
    wanted = labels != -100
    rows = wanted.nonzero()[:, 0]

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        if hidden.shape[:2] != batch["input_ids"].shape:  # the model narrowed it itself, or has another layout
            raise DataError(f"{type(model).__name__}: its head got {tuple(hidden.shape)}, not one vector per token")
        return (hidden[:, :-1][wanted], *inputs[1:])

    inner = model.module if isinstance(model, DistributedDataParallel) else model
    head = inner.get_output_embeddings()
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    if head is None:  # a model that does not report its head
        logits = model(**inputs, use_cache=False).logits[:, :-1][wanted]
        return functional.cross_entropy(logits.float(), labels[wanted], reduction="none"), rows
    handle = head.register_forward_pre_hook(narrow)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return functional.cross_entropy(logits.float(), labels[wanted], reduction="none"), rows


def supervised_tokens(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Return the number of tokens of rows that count for the loss; the first token of a row is never predicted.

    Args:
        rows: (input_ids, labels) of each row.
    """
    return sum(sum(label != -100 for label in labels[1:]) for _, labels in rows)


def row_losses(model: Any, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the supervised tokens of each row, float32 [b].

    A row without a supervised token has loss 0 and no gradient.

    Args:
        model: A causal language model.
        batch: b rows.
    """
    losses, rows = token_losses(model, batch)
    total = losses.new_zeros(len(batch["labels"])).index_add(0, rows, losses)
    return total / torch.bincount(rows, minlength=len(total)).clamp_min(1)


def answer_losses(model: Any, batch: Batch) -> Tensor:
    """Return the summed negative log likelihood of the supervised tokens of each row, float32 [b].

    Args:
        model: A causal language model.
        batch: b rows.
    """
    return row_losses(model, batch) * (batch["labels"][:, 1:] != -100).sum(1).clamp_min(1)


def dense_answer_losses(model: Any, batch: Batch) -> Tensor:
    """Return `answer_losses` in the form that torch.func can transform, float32 [b].

    Args:
        model: A causal language model.
        batch: b rows.
    """
    return dense_row_losses(model, batch) * (batch["labels"][:, 1:] != -100).sum(1).clamp_min(1)


def dense_row_losses(model: Any, batch: Batch) -> Tensor:
    """Return `row_losses` with logits at every position, float32 [b].

    torch.func can transform this form, because no shape depends on the data.

    Args:
        model: A causal language model.
        batch: b rows.
    """
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp_min(1)


def last_states(model: Any, ids: Tensor) -> Tensor:
    """Return the hidden states of the last layer, [b, s, width].

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
    if states is None and head is not None:  # models that do not report their decoder (Llama 4)
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        states = seen[-1] if seen else None
    if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:
        raise DataError(
            f"{type(model).__name__} returns no hidden states (one vector per token); use a method that needs none"
        )
    return states


def losses_for(method: str) -> Callable[[Any, Batch], Tensor]:
    """Return the loss per row in the form that a method of per-example gradients needs.

    Args:
        method: "hooks", "vmap" or "loop".
    """
    return dense_row_losses if method == "vmap" else row_losses


def answer_losses_for(method: str) -> Callable[[Any, Batch], Tensor]:
    """Return the summed loss per row in the form that a method of per-example gradients needs.

    Args:
        method: "hooks", "vmap" or "loop".
    """
    return dense_answer_losses if method == "vmap" else answer_losses


def seen_parameters(module: Any, params: Mapping[str, Tensor], method: str) -> list[str]:
    """Return the names of parameters from which features are made.

    For adapters of any kind, these are all matrices; with `hooks`, adapters other than plain LoRA take one pass per
    row. For whole weights with `hooks`, these are the weights of linear layers without the output head, whose input
    `token_losses` narrows to supervised tokens: the gradient per row of an embedding or a head is as large as the
    vocabulary.

    Args:
        module: The model.
        params: The candidates by name.
        method: "hooks", "vmap" or "loop".
    """
    if method != "hooks":
        return list(params)
    output = module.get_output_embeddings()
    head = {id(p) for p in output.parameters()} if output is not None else set()
    seen = {name for name in covered(module, list(params)) if id(params[name]) not in head}
    if hasattr(module, "peft_config"):
        seen |= {name for name in params if ".modules_to_save." not in name and ".original_module." not in name}
    return [name for name in params if name in seen]
