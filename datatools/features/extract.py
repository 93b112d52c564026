"""Feature extraction: gradient -> the optimizer's update for each row -> projection -> store. Units can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datatools.features.store import GradientFeatures
from datatools.gradients import Batch, Loss, Method, TokenBudget, micro_batches, visit_per_sample_grads
from datatools.gradients.factors import Factors
from datatools.projectors import Projector
from optim import SGDRule, UpdateMap, UpdateRule


def extract(
    store: GradientFeatures,
    module: nn.Module,
    loss: Loss,
    fetch: Callable[[Sequence[str]], Batch],
    lengths: Mapping[str, int],
    updates: UpdateMap,
    projector: Projector,
    *,
    method: Method = "hooks",
    token_budget: int | TokenBudget = 1024,
    name: Callable[[str], str] = "row {}".format,
    advance: Callable[[int, int], Any] | None = None,
    rank: int = 0,
    world: int = 1,
    units: Iterable[int] | None = None,
) -> None:
    """Compute and write the units that are missing in `store`.

    Rank u mod world computes unit u, independently of other ranks. The feature of a row depends on the other rows of
    its batch only by rounding. The batches are fixed by the plan, so a run that was killed and resumed writes the same
    bytes. A batch that does not fit into memory is repeated in batches half as large, and what follows is computed in
    these; the bytes are then those of the smaller budget, from the unit at which it happened.

    Cost: `visit_per_sample_grads`, the update and the projection; the last two are cheap for LoRA.
    Memory: one batch of `token_budget` tokens, one layer's per-sample gradients (at most 256 MiB for a matrix, or its
    factors) and one unit of features, whatever the number of rows.

    Args:
        store: where features are written.
        module: the model.
        loss: (module, batch) -> [b], one loss per row.
        fetch: keys -> their padded batch, name -> [b, ...].
        lengths: key -> number of tokens.
        updates: the optimizer at the checkpoint, restricted to the parameters that features cover (rules=`SGDRule()`
            gives plain gradients).
        projector: projector with the store's dimension.
        method: how per-sample gradients are computed; see `per_sample_grads`.
        token_budget: tokens per batch, including padding; a `TokenBudget` says when they are halved.
        name: key -> what errors call the row.
        advance: called with (rows, tokens) after each batch.
        rank: rank of this process.
        world: number of processes that fill the store.
        units: the units to compute, in place of those of `rank`; each is committed before the next one is asked for, so
            that an iterator may share units out among processes.

    Raises:
        EnvironmentProblem: if the file system reports an error, such as a full disk, or one row alone does not fit
            into memory.

    Example:
        >>> import tempfile
        >>> from datatools import PROJECTORS, GradientFeatures, extract, files
        >>> from optim import SGDRule, UpdateMap, create
        >>> module = nn.Linear(3, 2).eval()
        >>> rows = {files.digest(b"%d" % i): torch.full((3,), float(i)) for i in range(4)}
        >>> updates = UpdateMap.of(create("sgd", list(module.named_parameters()), lr=0.1), rules=SGDRule())
        >>> store = GradientFeatures.create_or_open(tempfile.mkdtemp(), meta={"step": 0}, dim=8, keys=list(rows))
        >>> extract(
        ...     store,
        ...     module,
        ...     lambda module, batch: module(batch["x"]).square().sum(1),
        ...     lambda keys: {"x": torch.stack([rows[key] for key in keys])},
        ...     dict.fromkeys(rows, 3),
        ...     updates,
        ...     PROJECTORS["sjlt"].of({n: p.shape for n, p in updates.params.items()}, dim=8, seed=0),
        ... )
        >>> store.missing_units(), store.take(list(rows)).shape
        ([], torch.Size([4, 8]))

    """
    budget = token_budget if isinstance(token_budget, TokenBudget) else TokenBudget(token_budget)
    for unit in store.missing_units(rank, world) if units is None else units:
        keys = store.unit_keys(unit)
        features = torch.zeros(len(keys), projector.dim)
        losses, norms = torch.zeros(len(keys)), torch.zeros(len(keys))
        sizes = [lengths[key] for key in keys]

        def work(
            rows: list[int], at: Tensor, keys: Sequence[str] = keys, into: Any = (features, losses, norms)
        ) -> None:
            of = [keys[i] for i in rows]
            found = batch_rows(module, loss, fetch(of), updates, projector, method=method)
            for held, values in zip(into, found, strict=True):
                held[at] = values
            if advance is not None:
                advance(len(rows), sum(lengths[key] for key in of))

        names = [name(key) for key in keys]
        micro_batches(sizes, budget.tokens, torch.tensor).each(work, budget, names.__getitem__)
        finite = features.isfinite().all(1) & losses.isfinite() & norms.isfinite()
        statuses = [
            "nonfinite" if not ok else "empty" if norm == 0 else "ok"
            for ok, norm in zip(finite.tolist(), norms.tolist(), strict=True)
        ]
        info = {"loss": _json(losses), "gradient_norm": _json(norms)}
        store.write_unit(unit, torch.where(finite[:, None], features, 0.0), statuses, info)


def batch_rows(
    module: nn.Module, loss: Loss, batch: Batch, updates: UpdateMap, projector: Projector, *, method: Method = "hooks"
) -> tuple[Float[Tensor, "b dim"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Compute the features of one batch of b rows.

    The update of a parameter is computed and projected as soon as its gradients exist, so that only one layer's
    gradients are in memory at a time. Where these would take more than 256 MiB, inputs and output gradients of a linear
    layer or embedding are kept instead, and some rows of the matrix at a time are computed, updated and projected. The
    projector `factored` takes plain gradients from these factors without computing them at all.

    Args:
        module: the model.
        loss: (module, batch) -> [b], one loss per row.
        batch: name -> [b, ...].
        updates: the optimizer at the checkpoint, restricted to the parameters that features cover.
        projector: gradients -> features.
        method: how per-sample gradients are computed; see `per_sample_grads`.

    Returns:
        Features [b, dim], losses [b] and norms of the plain gradients [b]; float32, on the CPU.

    Example:
        >>> from datatools import PROJECTORS, batch_rows
        >>> from optim import SGDRule, UpdateMap, create
        >>> module = nn.Linear(3, 2, bias=False).eval()
        >>> updates = UpdateMap.of(create("sgd", list(module.named_parameters()), lr=0.1), rules=SGDRule())
        >>> identity = PROJECTORS["identity"].of({"weight": module.weight.shape}, dim=1, seed=0)
        >>> def loss(module, batch):
        ...     return module(batch["x"]).sum(1)
        >>> features, losses, norms = batch_rows(module, loss, {"x": torch.ones(4, 3)}, updates, identity)
        >>> features.shape, norms.square().round()
        (torch.Size([4, 6]), tensor([6., 6., 6., 6.]))

    """
    size = len(next(iter(batch.values())))
    device = next(iter(updates.params.values())).device
    out = torch.zeros(size, projector.dim, device=device)
    squares = torch.zeros(size, device=device)

    def visit(name: str, grad: Tensor) -> None:
        squares.add_(grad.flatten(1).float().square().sum(1))
        projector.accumulate_updates(out, updates, name, grad)

    def take(factors: Factors) -> None:
        if projector.takes_factors and _plain(updates.rules[factors.name]):
            squares.add_(factors.squared_norms())
            return projector.accumulate_factors(out, factors)
        if not _by_parts(updates, factors.name):
            return visit(factors.name, factors.dense())
        count, width = factors.shape
        step = max(1, _PART_BYTES // (size * width * 4))
        for start in range(0, count, step):
            grad = factors.part(start, min(start + step, count))
            squares.add_(grad.flatten(1).float().square().sum(1))
            update = _update_part(updates, factors.name, start, grad)
            projector.accumulate_part(out, factors.name, factors.shape, start, update)

    direct = projector.takes_factors and all(_plain(rule) for rule in updates.rules.values())
    losses = visit_per_sample_grads(
        loss, module, batch, list(updates.params), visit, method=method, take=take, above=0 if direct else _WHOLE_BYTES
    )
    return out.cpu(), losses.float().cpu(), squares.sqrt().cpu()


_WHOLE_BYTES = 256 << 20
"""Per-sample gradients of a matrix that take more memory are computed, updated and projected in parts."""
_PART_BYTES = 32 << 20


def _plain(rule: UpdateRule) -> bool:
    """Return whether the update is the gradient itself."""
    return isinstance(rule, SGDRule) and rule.momentum == 0


def _by_parts(updates: UpdateMap, name: str) -> bool:
    """Return whether the update of some rows of a matrix follows from their gradients and states."""
    shape = updates.params[name].shape
    states = updates.states[name].values()
    return updates.rules[name].elementwise and all(state.ndim == 0 or state.shape == shape for state in states)


def _update_part(updates: UpdateMap, name: str, start: int, grad: Tensor) -> Tensor:
    """Compute the updates of some rows of a matrix."""
    rows = slice(start, start + grad.shape[1])
    state = {key: value if value.ndim == 0 else value[rows] for key, value in updates.states[name].items()}
    return updates.rules[name].update(grad, state, updates.params[name][rows])[0]


def _json(values: Tensor) -> list[float | None]:
    """Convert numbers for JSON, which has no nan and no infinities: they become None."""
    return [value if ok else None for value, ok in zip(values.tolist(), values.isfinite().tolist(), strict=True)]
