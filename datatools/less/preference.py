"""Features of preferences: how much a row's gradient speaks for its chosen answer and against its rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from datatools.features.extract import batch_rows
from datatools.features.store import GradientFeatures
from datatools.gradients import Batch, Loss, Method, TokenBudget, micro_batches
from datatools.projectors import Projector
from optim import UpdateMap


def extract_preferences(
    store: GradientFeatures,
    module: nn.Module,
    loss: Loss,
    chosen: Callable[[Sequence[str]], Batch],
    rejected: Callable[[Sequence[str]], Batch],
    lengths: Mapping[str, int],
    updates: UpdateMap,
    projector: Projector,
    *,
    method: Method = "hooks",
    token_budget: int | TokenBudget = 1024,
    name: Callable[[str], str] = "row {}".format,
    advance: Callable[[int, int], Any] | None = None,
    units: Iterable[int] | None = None,
) -> None:
    """Compute and write the units that are missing in `store`: gradients of the DPO loss, projected.

    The DPO loss of a pair is -log sigmoid(beta (m - m_ref)), where m is the log likelihood of the chosen answer minus
    that of the rejected one, and m_ref the same of the reference model. Its gradient is

        beta sigmoid(-beta (m - m_ref)) (grad nll_chosen - grad nll_rejected),

    at the reference itself (where training starts) beta / 2 times the difference. The factor is positive and a number
    per pair, and a store keeps features of unit length: so neither beta nor the reference changes a feature, and no
    reference model is needed.

    Cost: one forward and backward pass over both answers of each pair.

    Args:
        store: where features are written.
        module: the model.
        loss: (module, batch) -> [b], the negative log likelihood of each answer, summed over its tokens.
        chosen: keys -> the padded batch of the prompts with their chosen answers.
        rejected: keys -> that with their rejected answers, in the same order.
        lengths: key -> number of tokens of the longer of the two.
        updates: the map from gradients to updates; it must be linear, as that of `SGDRule()` is.
        projector: projector with the store's dimension.
        method: how per-sample gradients are computed; see `per_sample_grads`.
        token_budget: tokens per batch, including padding, halved as by `extract`.
        name: key -> what errors call the row.
        advance: called with (pairs, tokens of both answers) after each batch.
        units: the units to compute, as for `extract`; None is all that are missing.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7. As the target of a selection: ROSE, arXiv 2412.00631.

    Example:
        >>> import tempfile
        >>> from datatools import PROJECTORS, GradientFeatures, extract_preferences, files
        >>> from optim import SGDRule, UpdateMap, create
        >>> module = nn.Linear(3, 2).eval()
        >>> updates = UpdateMap.of(create("sgd", list(module.named_parameters()), lr=0.1), rules=SGDRule())
        >>> key = files.digest(b"a pair")
        >>> store = GradientFeatures.create_or_open(tempfile.mkdtemp(), meta={"step": 0}, dim=8, keys=[key])
        >>> extract_preferences(
        ...     store,
        ...     module,
        ...     lambda module, batch: module(batch["x"]).square().sum(1),
        ...     lambda keys: {"x": torch.ones(len(keys), 3)},
        ...     lambda keys: {"x": torch.zeros(len(keys), 3)},
        ...     {key: 3},
        ...     updates,
        ...     PROJECTORS["sjlt"].of({n: p.shape for n, p in updates.params.items()}, dim=8, seed=0),
        ... )
        >>> store.missing_units(), store.take([key]).shape
        ([], torch.Size([1, 8]))
    """
    budget = token_budget if isinstance(token_budget, TokenBudget) else TokenBudget(token_budget)
    for unit in store.missing_units() if units is None else units:
        keys = store.unit_keys(unit)
        features, norms = torch.zeros(len(keys), projector.dim), torch.zeros(len(keys))
        losses = torch.zeros(len(keys))
        sizes = [lengths[key] for key in keys]

        def work(
            group: list[int], index: torch.Tensor, keys: Sequence[str] = keys, into: Any = (features, losses)
        ) -> None:
            of = [keys[i] for i in group]
            both = [
                batch_rows(module, loss, fetch(of), updates, projector, method=method) for fetch in (chosen, rejected)
            ]
            for sign, (found, values, _) in zip((1.0, -1.0), both, strict=True):
                into[0][index] += sign * found
                into[1][index] += sign * values
            if advance is not None:
                advance(len(group), sum(2 * lengths[key] for key in of))

        micro_batches(sizes, budget.tokens, torch.tensor).each(work, budget, [name(key) for key in keys].__getitem__)
        norms = features.norm(dim=1)  # of the projected difference: the exact one would need both gradients at once
        finite = features.isfinite().all(1) & losses.isfinite()
        statuses = [
            "nonfinite" if not ok else "empty" if norm == 0 else "ok"
            for ok, norm in zip(finite.tolist(), norms.tolist(), strict=True)
        ]
        known = [value if ok else None for value, ok in zip(losses.tolist(), finite.tolist(), strict=True)]
        lengths_of = [value if ok else None for value, ok in zip(norms.tolist(), finite.tolist(), strict=True)]
        info = {"loss": known, "gradient_norm": lengths_of}
        store.write_unit(unit, torch.where(finite[:, None], features, 0.0), statuses, info)
