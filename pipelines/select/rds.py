"""RDS+: the similarity of the model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datatools import DataError, GradientFeatures
from pipelines.models.losses import last_states
from pipelines.rows.rows import Rows
from pipelines.runs.progress import progress
from pipelines.select.scored import Context, Scored, from_similarity, spread, unique_among, usable_among
from pipelines.select.scorer import Asked, Work
from pipelines.select.stores import FEATURE_VERSION, filling, kept, open_store, tokens_of
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
    """RDS+: cosine of hidden states of the last layer, averaged over positions with weights 1, 2, ..., s.

    Source: Ivison et al. 2025, arXiv 2503.01807. Differs: rows are ranked by `aggregate`, as for every method; the
    paper takes turns between target rows (`--set aggregate=round_robin`).
    """
    similarity, good = _similarity(context, np.flatnonzero(context.pool.usable).tolist())
    text = "cosine of position-weighted mean hidden states (last layer) of pool and target row"
    tokens = context.pool.tokens() + context.wanted.tokens()
    return from_similarity(context, similarity, formula={"name": "rds+", "text": text}, good=good, tokens=tokens)


def columns(context: Context, rows: Sequence[int] | None = None) -> Tensor:
    """See `Scorer.columns`."""
    chosen, places, n = usable_among(context.pool, rows)
    similarity, good = _similarity(context, chosen)
    return spread(similarity.masked_fill(~good[:, None], float("nan")), places, n)


def _similarity(context: Context, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """float32 [chosen, usable target rows], and which of the pool rows `chosen` have finite hidden states."""
    wanted = np.flatnonzero(context.wanted.usable).tolist()
    with context.run.stage("hidden states"):
        pool, good = _hidden_states(context, "pool", context.pool, chosen)
        target, finite = _hidden_states(context, "target", context.wanted, wanted)
    if dead := [row for row, ok in zip(wanted, finite.tolist(), strict=True) if not ok]:
        raise DataError(
            f"target row {context.wanted.pool.where(dead[0])} has hidden states that are not finite ({len(dead)} "
            "such rows); remove it from the target"
        )
    return pool @ target.T, good


def work(context: Context) -> Work:
    """The tokens whose hidden states are needed; one forward pass each."""
    whole: dict[str, float] = {}
    left: dict[str, float] = {}
    for name, rows in (("pool", context.pool), ("target", context.wanted)):
        label = f"hidden states of the {name}"
        whole[label], left[label] = tokens_of(rows, context.features_folder / f"hidden-{name}")
    return Work(whole, left)


def reuse(config: SelectConfig) -> list[str]:
    """The run's hidden states serve another selection."""
    return [f"--set features.folder={config.features.folder or config.out / 'features'}"]


def nearest(asked: Asked) -> Tensor:
    """Cosines of the hidden states that the run has kept."""
    home = kept(asked, "hidden-pool")
    keys = [asked.target.keys[i] for i in np.flatnonzero(asked.target.usable).tolist()]
    hidden = GradientFeatures.open(home / "hidden-pool").take([asked.pool.keys[asked.index]])[0]
    return GradientFeatures.open(home / "hidden-target").take(keys) @ hidden


def _hidden_states(context: Context, kind: str, rows: Rows, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Unit vectors [chosen, hidden size] of the usable rows `chosen`, and which are finite; computed once, and kept."""
    loaded, unique = context.model(), rows.unique()
    model = loaded.model
    with torch.inference_mode():  # the width is what the model returns: some configurations name another (OPT-350m)
        shortest = min(unique.values(), key=lambda i: int(rows.scan.tokens[i]))
        size = last_states(model, rows.batch([shortest], model.device)["input_ids"]).shape[-1]
    meta = {
        "format": FEATURE_VERSION,
        "model": dict(loaded.digests),
        "encoding": rows.encoder.fingerprint(),
        "feature": "position-weighted mean of the last hidden states",
        "precision": str(model.dtype),
    }
    folder = context.features_folder / f"hidden-{kind}"
    with filling(folder):
        planned = unique_among(rows, chosen)
        store = open_store(context, folder, planned, among=unique, meta=meta, dim=size, dtype="float32")
        budget = context.config.features.token_budget
        todo = sum(int(rows.scan.tokens[unique[k]]) for u in store.missing_units() for k in store.unit_keys(u))
        with progress(f"hidden states of the {kind}", todo, "tokens") as bar, torch.inference_mode():
            for unit in store.missing_units():
                keys = store.unit_keys(unit)
                of_unit = [unique[key] for key in keys]
                lengths = [int(rows.scan.tokens[row]) for row in of_unit]
                found = torch.zeros(len(keys), size)
                for group, batch in rows.micro_batches(of_unit, budget, model.device):
                    hidden = last_states(model, batch["input_ids"]).float()
                    position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=torch.float32)
                    real = position <= torch.tensor([lengths[i] for i in group], device=hidden.device)[:, None]
                    weight = position * real
                    mean = (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
                    found[torch.tensor(group)] = mean.cpu()
                    bar.advance(sum(lengths[i] for i in group))
                store.write_unit(unit, found)
    keys = [rows.keys[i] for i in chosen]
    held = store.rows()
    finite = {key for key, status in zip(held.keys, held.status, strict=True) if status == "ok"}
    return store.take(keys), torch.tensor([key in finite for key in keys])
