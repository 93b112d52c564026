"""The logits of a row in a few numbers: their nuclear norm, and a random projection."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from datatools.colm.feature import FeatureKind
from datatools.colm.target import Target
from datatools.errors import DataError
from datatools.gradients import Batch, Loss

POSITIONS, WORDS = 8, 128
"""The projection is [8, 128] for a row of any length and any vocabulary, as in UDS's code."""
_SEED = 20251016


def logit_numbers(
    logits: Float[Tensor, "n vocabulary"], where: Int64[Tensor, " n"], rows: int
) -> Float32[Tensor, "b numbers"]:
    """Summarize the logits of each row at its supervised positions.

    Number 0 is the nuclear norm of the row's logits Z [t, vocabulary], the sum of their singular values. The others are
    a random projection A Z B to [8, 128] that preserves distances on average: A has independent signs, and B adds each
    word with a random sign to one of 128 numbers.

    Cost: O(t^2 v) per row for the norm and O(t v) for the projection.

    Args:
        logits: floating dtype [n, vocabulary], of all supervised positions.
        where: the row of each position, int64 [n].
        rows: number of rows b.

    Returns:
        float32 [b, 1 + 1024]; zeros for a row without a supervised position.

    Source:
        UDS, arXiv 2510.16882 and its code.

    Differs:
        The code reads the logits at all positions, padded to 512, and projects by subsampled Fourier transforms.

    Example:
        >>> logit_numbers(torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([0, 0]), 1)[:, 0]
        tensor([7.])

    """
    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = logits.shape[1]
    bucket = torch.randint(WORDS, (vocabulary,), generator=generator).to(logits.device)
    sign = _signs(vocabulary, generator).to(logits)
    short = torch.zeros(len(logits), WORDS, device=logits.device, dtype=torch.float32)
    short.index_add_(1, bucket, (logits * sign).float())
    longest = int(torch.bincount(where, minlength=1).max()) if len(where) else 0
    mix = _signs(longest * POSITIONS, torch.Generator().manual_seed(_SEED + 1)).view(longest, POSITIONS)
    mix = mix.to(short) / POSITIONS**0.5
    found = torch.zeros(rows, 1 + POSITIONS * WORDS, device=logits.device)
    for row in range(rows):
        mine = where == row
        if not bool(mine.any()):
            continue
        z = logits[mine].double()
        gram = z @ z.T if len(z) <= vocabulary else z.T @ z
        found[row, 0] = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
        found[row, 1:] = (mix[: len(z)].T @ short[mine]).flatten()
    return found


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).float() * 2 - 1


def head_of(model: nn.Module) -> nn.Module:
    """Return the output head of a model.

    Args:
        model: a language model of transformers or peft.

    Returns:
        The layer that makes logits.

    Raises:
        DataError: if the model does not report one.

    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        raise DataError(f"{type(model).__name__} does not report its output head, whose logits this choice reads; use "
                        "a method that reads gradients")  # fmt: skip
    return head


def supervised(output: Float[Tensor, "... vocabulary"], labels: Int64[Tensor, "b s"]) -> Float[Tensor, "n vocabulary"]:
    """Return the logits at supervised positions.

    Args:
        output: what the head returned: [n, vocabulary] of these positions only, or [b, s, vocabulary].
        labels: int64 [b, s], not shifted.

    Returns:
        [n, vocabulary].

    """
    return output[:, :-1][labels[:, 1:] != -100] if output.ndim == 3 else output


def _measure(model: nn.Module, losses: Loss, batch: Batch, target: Target, directions: Tensor, *, eps: float) -> Tensor:
    seen: list[Tensor] = []
    handle = head_of(model).register_forward_hook(lambda _, args, output: seen.append(output.detach()))
    try:
        with torch.no_grad():
            losses(model, batch)
    finally:
        handle.remove()
    labels = batch["labels"]
    where = (labels[:, 1:] != -100).nonzero()[:, 0]
    return logit_numbers(supervised(seen[-1], labels), where, len(labels))


def _width(*_: Any) -> int:
    return 1 + POSITIONS * WORDS


LOGITS = FeatureKind(
    name="logits",
    title="the nuclear norm of the logits, and a random projection of them",
    measure=_measure,
    cost="a forward pass",
    width=_width,
    as_training=False,
)
