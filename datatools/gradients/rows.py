"""Which row of the batch each token of a layer belongs to.

Most layers see [rows, tokens, features], but not all: OPT flattens rows and tokens into one dimension, some models put
time first, experts see tokens in the order of the router. A size alone cannot tell them apart, so it is measured: rows
do not see each other, hence the gradient that a token gets is that of its own row's loss, and if the loss of row i is
multiplied by 2^i, the gradients of its tokens are multiplied by exactly 2^i in floating point. One backward pass with
such weights tells the row of every token, whatever the model did to the order. Where a layer turns out to keep an order
that follows from its shape, this is remembered, and later batches need no such pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from datatools.gradients.types import Batch, size_of

Layout = Literal["blocks", "routed"] | int
"""Tokens of a row are one block of the flattened tokens ("blocks"), lie along one dimension (its number), or change
from batch to batch ("routed")."""


def weightings(size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Weights [size] of the rows' losses, powers of two: one vector for each digit of a row's number."""
    radix = _radix(dtype)
    number, numbers = torch.arange(size), size
    while numbers > 1:
        yield torch.pow(2.0, (number % radix - radix // 2).double())
        number, numbers = number // radix, -(-numbers // radix)


def _radix(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float16 else 32  # of float16's 30 powers of two, gradients themselves need most


def identify(weighted: Sequence[Tensor], plain: Tensor, size: int, dtype: torch.dtype) -> Tensor | None:
    """The row of each token [n], -1 where its gradient is zero; None if some token belongs to no single row.

    weighted: largest absolute gradient of each token [n], for each of `weightings`; plain: the same without weights.
    """
    radix = _radix(dtype)
    rows, unit = torch.zeros(len(plain), dtype=torch.int64), 1
    plain = plain.double().cpu()
    zero = plain == 0
    for values in weighted:
        exponent = (values.double().cpu() / plain).log2() + radix // 2
        digit = exponent.round()
        wrong = ~((exponent - digit).abs() < 0.1) | (digit < 0) | (digit >= radix)  # NaN counts as wrong
        if bool((wrong & ~zero & ~(plain < 1e-6 * plain[~zero].max() if bool((~zero).any()) else zero)).any()):
            return None
        rows += unit * digit.nan_to_num(0, 0, 0).clamp(0, radix - 1).to(torch.int64)
        unit *= radix
    rows = rows.clamp_max(size - 1)
    rows[zero] = -1
    return rows


def spread(layout: Layout, tokens: torch.Size, size: int) -> Tensor:
    """The row of each flattened token [n] under a layout."""
    count = tokens.numel()
    if layout == "blocks":
        return torch.arange(count) // (count // size)
    assert isinstance(layout, int)
    return torch.arange(size).view(-1, *([1] * (len(tokens) - layout - 1))).expand(tokens).reshape(-1)


@dataclass
class Layouts:
    """What is known of a model's layers: (parameter, number of its use, number of token dimensions) -> layout."""

    known: dict[tuple[str, int, int], Layout] = field(default_factory=dict)

    def of(self, key: tuple[str, int, int], tokens: torch.Size, batch: Batch) -> Layout | None:
        """The layout to count on, or None where the rows must be measured."""
        layout = self.known.get(key)
        return layout if layout is not None and layout in candidates(tokens, batch) else None

    def learn(self, key: tuple[str, int, int], tokens: torch.Size, batch: Batch, rows: Tensor) -> None:
        """Remember what `rows` [n] (-1: not known) show, if they leave one possibility."""
        if self.known.get(key) == "routed" or len(set(rows[rows >= 0].tolist())) < 2:
            return
        size, seen = size_of(batch), rows >= 0
        possible = candidates(tokens, batch)
        fitting = [c for c in possible if bool((spread(c, tokens, size)[seen] == rows[seen]).all())]
        if not fitting:
            self.known[key] = "routed"
        elif len(fitting) == 1:
            self.known[key] = fitting[0]


def candidates(tokens: torch.Size, batch: Batch) -> list[Layout]:
    """The layouts that these token dimensions allow for this batch.

    Vectors without a token dimension are only taken for one a row where the batch holds no token ids: among tokens,
    as many vectors as rows may also be what a router picked.
    """
    size = size_of(batch)
    ids = [tensor for tensor in batch.values() if tensor.ndim == 2 and not tensor.is_floating_point()]
    found: list[Layout] = []
    if len(tokens) == 1:
        if tokens[0] in {len(t) * t.shape[1] for t in ids} or (not ids and tokens[0] == size):
            found.append("blocks")
    elif tokens and tokens[0] % size == 0:
        found.append("blocks")
    return found + [k for k in range(1, len(tokens)) if tokens[k] == size]
