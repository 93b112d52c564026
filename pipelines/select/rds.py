"""RDS+: the similarity of the model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datatools import DataError, GradientFeatures
from pipelines.engines.units import taken
from pipelines.models.losses import last_states
from pipelines.models.states import LAST, pooled, states_and_losses
from pipelines.rows.rows import Rows
from pipelines.runs.memory import token_budget
from pipelines.runs.progress import progress
from pipelines.select import losses
from pipelines.select.scored import Context, Scored, from_similarity, spread, unique_among, usable_among
from pipelines.select.scorer import Asked, Space, Work
from pipelines.select.stores import FEATURE_VERSION, filling, job_of, kept, open_store, tokens_of
from pipelines.settings.methods import Method
from pipelines.settings.select import SelectConfig

METHOD = Method(
    summary="similarity of hidden states with the target rows",
    title="Hidden-state similarity (RDS)",
    meaning="The score is a cosine between the model's hidden states on the row and on the target rows: how alike the "
    "model finds them; no gradient takes part.",
    label="hidden states (RDS)",
    rows="rows picked by hidden states",
    needs=("target", "model"),
    kind="similarity",
    forward=("pool", "target"),
    stored=True,
    measure="cosine, Hidden-state similarity (RDS)",
    cost="one forward pass per row of pool and target",
    limits="finds rows that look alike to the model, not rows that teach it",
)


def score(context: Context) -> Scored:
    """Score by the cosine of hidden states, averaged over positions with weights 1, 2, ..., s (last layer by default).

    `features.layer` and `features.pooling` choose another layer and another average. The same forward pass computes the
    losses of the rows, which are kept for the methods that need them.

    Args:
        context: What is scored.

    Source:
        RDS+, Ivison et al. 2025, arXiv 2503.01807. Differs: rows are ranked by `aggregate`, as for every method; in the
        paper, target rows take turns (`--set aggregate=round_robin`).
    """
    similarity, good = _similarity(context, np.flatnonzero(context.pool.usable).tolist())
    if _store(context.config, "pool") == "hidden-pool":
        text = "cosine of position-weighted mean hidden states (last layer) of pool and target row"
    else:
        text = f"cosine of the {_feature(context.config)[0]} of pool and target row"
    tokens = context.pool.tokens() + context.wanted.tokens()
    return from_similarity(context, similarity, formula={"name": "rds+", "text": text}, good=good, tokens=tokens)


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """Return the cosines with the target rows, as `Scorer.columns` says.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
    """
    chosen, places, n = usable_among(context.pool, rows)
    similarity, good = _similarity(context, chosen)
    return spread(similarity.masked_fill(~good[:, None], float("nan")), places, n)


def _similarity(context: Context, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Return float32 [chosen, usable target rows], and which of the pool rows `chosen` have finite hidden states."""
    wanted = np.flatnonzero(context.wanted.usable).tolist()
    with context.run.stage("hidden states"):
        pool, good = _hidden_states(context, "pool", context.pool, chosen)
        target, finite = _hidden_states(context, "target", context.wanted, wanted)
    context.merge()
    if dead := [row for row, ok in zip(wanted, finite.tolist(), strict=True) if not ok]:
        raise DataError(
            f"target row {context.wanted.pool.where(dead[0])} has hidden states that are not finite ({len(dead)} "
            "such rows); remove it from the target"
        )
    return pool @ target.T, good


def work(context: Context) -> Work:
    """Return the tokens whose hidden states are needed, for one forward pass each.

    Args:
        context: What is scored.
    """
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    for name, rows in (("pool", context.pool), ("target", context.wanted)):
        label = f"hidden states of the {name}"
        whole[label], left[label] = tokens_of(rows, context.features_folder / _store(context.config, name))
    return Work(whole, left)


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the hidden states of this run.

    Args:
        config: The settings of the finished run.
    """
    return [f"--set features.folder={config.features.folder or config.out / 'features'}"]


def nearest(asked: Asked) -> Tensor:
    """Return the cosines, float32 [m], of the hidden states that the run has kept.

    Args:
        asked: The question.
    """
    pool, target = (_store(asked.config, kind) for kind in ("pool", "target"))
    home = kept(asked, pool)
    keys = [asked.target.keys[i] for i in np.flatnonzero(asked.target.usable).tolist()]
    hidden = GradientFeatures.open(home / pool).take([asked.pool.keys[asked.index]])[0]
    return GradientFeatures.open(home / target).take(keys) @ hidden


def spaces(config: SelectConfig, folder: Path) -> list[Space]:
    """Return the hidden states that the run has kept.

    Args:
        config: The settings of the finished run.
        folder: The folder of the run.
    """
    home = config.features.folder or folder / "features"
    return [Space(1.0, home / "hidden-pool", home / "hidden-target")]


def _hidden_states(context: Context, kind: str, rows: Rows, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Return unit vectors [chosen, hidden size] of usable rows, computed once and kept, and which are finite."""
    loaded, unique, how = context.model(), rows.unique(), context.config.features
    model = loaded.model
    with torch.inference_mode():  # the width is what the model returns: some configurations name another (OPT-350m)
        shortest = min(unique.values(), key=lambda i: int(rows.scan.tokens[i]))
        batch = rows.batch([shortest], model.device)
        if how.layer == LAST:
            size = last_states(model, batch["input_ids"]).shape[-1]
        else:
            size = states_and_losses(model, batch, how.layer)[0].shape[-1]
    meta = {
        "format": FEATURE_VERSION,
        "model": dict(loaded.digests),
        "encoding": rows.encoder.fingerprint(),
        "feature": _feature(context.config)[0],
        "precision": str(model.dtype),
    }
    folder = context.features_folder / _store(context.config, kind)
    with filling(folder), filling(losses.folder_of(context, kind)):
        planned = unique_among(rows, chosen)
        store = open_store(context, folder, planned, among=unique, meta=meta, dim=size, dtype="float32")
        missing = store.missing_units()
        besides = _losses_besides(context, kind, rows, store, missing)

        def tokens_in(unit: int) -> int:
            return sum(int(rows.scan.tokens[unique[key]]) for key in store.unit_keys(unit))

        todo = sum(map(tokens_in, missing))
        label = f"hidden states of the {kind}"
        budget = token_budget(how.token_budget, label)
        with progress(label, todo, "tokens") as bar, torch.inference_mode():
            for unit in taken(job_of(store, bar, tokens_in)):
                keys = store.unit_keys(unit)
                of_unit = [unique[key] for key in keys]
                lengths = [int(rows.scan.tokens[row]) for row in of_unit]
                found, lost = torch.zeros(len(keys), size), torch.zeros(len(keys))

                def keep(
                    group: list[int],
                    batch: dict[str, Tensor],
                    lengths: list[int] = lengths,
                    found: Tensor = found,
                    lost: Tensor = lost,
                ) -> None:
                    hidden, values = states_and_losses(model, batch, how.layer)
                    long = torch.tensor([lengths[i] for i in group])
                    found[torch.tensor(group)] = pooled(hidden, batch["labels"], long, how.pooling).cpu()
                    lost[torch.tensor(group)] = values.float().cpu()
                    bar.advance(sum(lengths[i] for i in group))

                rows.each_batch(keep, of_unit, budget, model.device)
                if besides is not None:  # before the states: a run that is killed between the two computes both again
                    besides.add(keys, lost)
                store.write_unit(unit, found)
    wanted = [rows.keys[i] for i in chosen]
    held = store.rows()
    finite = {key for key, status in zip(held.keys, held.status, strict=True) if status == "ok"}
    return store.take(wanted), torch.tensor([key in finite for key in wanted])


def _losses_besides(
    context: Context, kind: str, rows: Rows, store: GradientFeatures, missing: list[int]
) -> losses.ByProduct | None:
    """Return where the losses of the rows of `missing` go, in units of the same rows; None if nothing is missing."""
    if not missing:
        return None
    unique = rows.unique()
    planned = {key: unique[key] for unit in missing for key in store.unit_keys(unit)}
    size = len(store.unit_keys(missing[0]))
    return losses.ByProduct(losses.open_losses(context, kind, rows, planned, rows_per_unit=size))


_POOLED = {
    "weighted": "position-weighted mean of the",
    "mean": "mean of the",
    "last": "last token's",
    "answer": "mean over the answer of the",
}


def _feature(config: SelectConfig) -> tuple[str, str]:
    """Return a description of a row's vector, and its short form for the name of a folder."""
    layer, pooling = config.features.layer, config.features.pooling
    if layer == LAST:
        which, short = "last hidden states", "last1"
    elif layer < 0:
        which, short = f"hidden states of layer {layer} from the end", f"last{-layer}"
    else:
        which, short = f"hidden states of layer {layer}", f"layer{layer}"
    return f"{_POOLED[pooling]} {which}", f"{pooling}-{short}"


def _store(config: SelectConfig, kind: str) -> str:
    """Return the name of the store of hidden states of the pool or the target; defaults do not appear in it."""
    features = config.features
    default = type(features)()
    if (features.layer, features.pooling) == (default.layer, default.pooling):
        return f"hidden-{kind}"
    return f"hidden-{kind}-{_feature(config)[1]}"
