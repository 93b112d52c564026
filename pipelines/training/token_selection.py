"""Token selection (Rho-1): each step trains on the tokens whose loss exceeds that of a reference model most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datatools import DataError
from pipelines.models import load as models
from pipelines.models.losses import token_losses
from pipelines.rows.rows import Rows
from pipelines.runs.memory import token_budget
from pipelines.runs.progress import progress
from pipelines.settings.parts import ModelConfig
from pipelines.settings.train import TokensConfig

BUDGET = 8192


class TokenSelection:
    """Keeps the share of each row's supervised tokens with the largest excess loss.

    The excess of a token is its loss under the model that trains, minus its loss under the reference model: tokens that
    the reference predicts and the model does not yet. Tokens that both find hard are noise, and those that both find
    easy are learned. The mean loss of a step is that of the kept tokens.

    Args:
        share: The share of each row's tokens that is kept, rounded up.
        reference: The number of each row -> the losses of its supervised tokens under the reference model, [n].

    Source:
        Lin et al. 2024, Rho-1: Not All Tokens Are What You Need, arXiv 2404.07965, section 2.2.

    Differs:
        The paper takes the largest excess of a whole batch; here it is that of each row, so that neither the split
        into micro-batches nor the number of processes changes which tokens count.
    """

    def __init__(self, share: float, reference: Mapping[int, Tensor]) -> None:
        self.share, self.reference = share, reference

    def count(self, tokens: int) -> int:
        """Return how many of the supervised tokens of a row are kept.

        Args:
            tokens: Their number.
        """
        return math.ceil(self.share * tokens - 1e-9)

    def kept(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
        """Return how many tokens of some rows are kept.

        Args:
            items: (input_ids, labels) of each row.
        """
        return sum(self.count(sum(label != -100 for label in labels[1:])) for _, labels in items)

    def keep(self, rows: Sequence[int], losses: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of the kept tokens of a micro-batch, and their rows.

        Args:
            rows: The numbers of its rows.
            losses: The loss of every supervised token, float32 [n], row by row.
            where: The row of each, int64 [n].
        """
        excess = losses.detach() - torch.cat([self.reference[row] for row in rows]).to(losses)
        kept = torch.zeros_like(excess, dtype=torch.bool)
        for place in range(len(rows)):
            mine = (where == place).nonzero()[:, 0]
            best = excess[mine].argsort(descending=True, stable=True)[: self.count(len(mine))]
            kept[mine[best]] = True
        return losses[kept], where[kept]


def reference_of(settings: TokensConfig, model: ModelConfig) -> ModelConfig:
    """Return the configuration of the reference model, on the device of the model that trains.

    Args:
        settings: The settings of token selection.
        model: The model that trains.
    """
    return ModelConfig(name=settings.reference, adapter=settings.adapter, device=model.device)


def check_reference(settings: TokensConfig, model: ModelConfig, tokenizer: Any) -> Mapping[str, str]:
    """Refuse a reference model with another vocabulary; return what identifies it.

    Args:
        settings: The settings of token selection.
        model: The model that trains.
        tokenizer: Its tokenizer.

    Raises:
        DataError: Its tokens are others.
    """
    found = models.load(reference_of(settings, model), tokenizer_only=True)
    if found.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"tokens.reference: {settings.reference} has other tokens than the model that trains, so that their losses "
            "cannot be compared; name a model with the same tokenizer"
        )
    return found.digests


def measured(settings: TokensConfig, model: ModelConfig, rows: Rows, chosen: Sequence[int]) -> TokenSelection:
    """Measure the losses of the tokens of all rows under the reference model, in one forward pass.

    Args:
        settings: The settings of token selection.
        model: The model that trains.
        rows: The rows.
        chosen: The numbers of the rows to train on.

    Raises:
        DataError: A loss of the reference model is not finite.
    """
    reference = models.load(reference_of(settings, model)).model
    found: dict[int, Tensor] = {}
    with torch.inference_mode(), progress("reference losses", len(chosen), "rows") as bar:

        def keep(group: list[int], batch: dict[str, Tensor]) -> None:
            losses, where = token_losses(reference, batch)
            for place, i in enumerate(group):
                mine = losses[where == place].float().cpu().clone()
                if not bool(mine.isfinite().all()):
                    raise DataError(f"tokens.reference: {settings.reference} has a loss that is not finite on "
                                    f"{rows.pool.where(chosen[i])}; name another model")  # fmt: skip
                found[chosen[i]] = mine
            bar.advance(len(group))

        rows.each_batch(keep, chosen, token_budget(BUDGET, "reference losses", ""), reference.device)
    return TokenSelection(settings.share, found)
