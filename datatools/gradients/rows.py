"""Which row of the batch each token of a layer belongs to.

Most layers see [rows, tokens, features], but not all: OPT flattens rows and tokens into one dimension, some models put
time first, and experts see tokens in the order of the router. Sizes alone cannot distinguish these, so the row is
measured: rows are independent, hence a token gets the gradient of its own row's loss, and if the loss of row i is
multiplied by 2^i, the gradients of its tokens are multiplied by exactly 2^i in floating point. One backward pass with
such weights gives the row of every token, whatever the model did to the order. If a layer's order follows from its
shape, this is remembered, and later batches need no such pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from datatools.gradients.types import Batch, size_of

Layout = Literal["blocks", "routed"] | int
"""The tokens of a row are one block of the flattened tokens ("blocks"), are along one dimension (its number), or change
from batch to batch ("routed")."""


def weightings(size: int, dtype: torch.dtype) -> Iterator[Float64[Tensor, " b"]]:
    """Yield weights of the rows' losses, powers of two: one vector for each digit of a row's number.

    Args:
        size: number of rows b.
        dtype: dtype of the gradients, whose range limits the exponents.

    Yields:
        float64 [b].

    """
    radix = _radix(dtype)
    number, numbers = torch.arange(size), size
    while numbers > 1:
        yield torch.pow(2.0, (number % radix - radix // 2).double())
        number, numbers = number // radix, -(-numbers // radix)


def _radix(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float16 else 32  # gradients need most of the range of float16's exponent


def sizes(g: Float[Tensor, "n features"]) -> Float[Tensor, "2 n"]:
    """Measure the gradient of each token: its largest element, and the sum of all.

    A token whose features belong to several rows may have its largest element in one of them; the sum gives it away.

    Args:
        g: gradients of tokens, floating dtype [n, features].

    Returns:
        The same dtype, or float32 instead of a shorter one, [2, n].

    """
    g = g.abs()
    wide = g.dtype if g.dtype == torch.float64 else torch.float32
    return torch.stack([g.amax(-1).to(wide), g.sum(-1, dtype=wide)])


def identify(
    weighted: Sequence[Tensor], plain: Float[Tensor, "k n"] | Float[Tensor, " n"], size: int, dtype: torch.dtype
) -> Int64[Tensor, " n"] | None:
    """Find the row of each token from its weighted gradients.

    Args:
        weighted: for each of `weightings`, what `sizes` says of the gradients, floating dtype [k, n].
        plain: the same without weights.
        size: number of rows.
        dtype: as for `weightings`.

    Returns:
        int64 [n], -1 for tokens with zero gradients; None if some token does not belong to a single row.

    """
    if plain.ndim == 2:
        found = [identify([one[k] for one in weighted], plain[k], size, dtype) for k in range(len(plain))]
        first = found[0]
        return first if first is not None and all(o is not None and torch.equal(o, first) for o in found) else None
    radix = _radix(dtype)
    slack = 0.01 if dtype in (torch.float32, torch.float64) else 0.1
    rows, unit = torch.zeros(len(plain), dtype=torch.int64), 1
    plain = plain.double().cpu()
    zero = plain == 0
    for values in weighted:
        exponent = (values.double().cpu() / plain).log2() + radix // 2
        digit = exponent.round()
        wrong = ~((exponent - digit).abs() < slack) | (digit < 0) | (digit >= radix)  # nan counts as wrong
        if bool((wrong & ~zero & ~(plain < 1e-6 * plain[~zero].max() if bool((~zero).any()) else zero)).any()):
            return None
        rows += unit * digit.nan_to_num(0, 0, 0).clamp(0, radix - 1).to(torch.int64)
        unit *= radix
    rows = rows.clamp_max(size - 1)
    rows[zero] = -1
    return rows


def spread(layout: Layout, tokens: torch.Size, size: int) -> Int64[Tensor, " n"]:
    """List the row of each flattened token under a layout.

    Args:
        layout: "blocks", or the number of a dimension.
        tokens: sizes of the token dimensions.
        size: number of rows.

    Returns:
        int64 [n].

    """
    count = tokens.numel()
    if layout == "blocks":
        return torch.arange(count) // (count // size)
    assert isinstance(layout, int)
    return torch.arange(size).view(-1, *([1] * (len(tokens) - layout - 1))).expand(tokens).reshape(-1)


@dataclass
class Layouts:
    """The layouts of a model's layers that are known so far.

    Attributes:
        known: (parameter, number of its use, number of token dimensions) -> layout.

    """

    known: dict[tuple[str, int, int], Layout] = field(default_factory=dict)

    def of(self, key: tuple[str, int, int], tokens: torch.Size, batch: Batch) -> Layout | None:
        """Look up a layout that is valid for this batch.

        Args:
            key: a key of `known`.
            tokens: sizes of the token dimensions.
            batch: the batch.

        Returns:
            The layout, or None if rows must be measured.

        """
        layout = self.known.get(key)
        return layout if layout is not None and layout in candidates(tokens, batch) else None

    def learn(self, key: tuple[str, int, int], tokens: torch.Size, batch: Batch, rows: Int64[Tensor, " n"]) -> None:
        """Remember the layout if the measured rows leave only one possibility.

        Args:
            key: a key of `known`.
            tokens: sizes of the token dimensions.
            batch: the batch.
            rows: the row of each flattened token, int64 [n]; -1 if unknown.

        """
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
    """List the layouts that these token dimensions allow for this batch.

    Vectors without a token dimension count as one per row only if the batch contains no token ids: otherwise, as many
    vectors as rows may also be a router's choice of tokens.

    Args:
        tokens: sizes of the token dimensions.
        batch: the batch.

    Returns:
        The layouts.

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
