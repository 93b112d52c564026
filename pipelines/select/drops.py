"""Scores by how far the loss of each pool row falls when the model is adapted to the target: `tov` and `tacs`.

Each pool row takes one forward pass with the model as it is, which all targets share and which `rds` computes on the
side, and one per adapter. No gradient of the pool is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import DataError, loss_drop
from pipelines.models import load as models
from pipelines.models.losses import token_losses
from pipelines.select.adaptation import LABEL, Adaptation, adapted, kept_adapter, prepare_adapters, put, work_tokens
from pipelines.select.losses import folder_of, losses
from pipelines.select.scored import Context, Scored, from_similarity, spread, usable_among
from pipelines.select.scorer import Asked, Work
from pipelines.select.stores import tokens_of
from pipelines.settings.select import SelectConfig


def setup_of(context: Context) -> Adaptation:
    """Return what the adapters of this run depend on.

    Args:
        context: What is scored.
    """
    return Adaptation(context.config, context.features_folder, context.pool, context.wanted, context.model())


def scored(context: Context, *, name: str, relative: bool) -> Scored:
    """Return the scores of the whole pool.

    Args:
        context: What is scored.
        name: The name of the formula.
        relative: Whether to divide each drop by the loss before the adaptation.
    """
    config, pool = context.config, context.pool
    chosen = np.flatnonzero(pool.usable).tolist()
    drops, before = drops_of(context, chosen, relative=relative)
    setup = setup_of(context)
    depth, rate = setup.choice() or (0, 0.0)
    drop = "(l_0(z) - l_T(z)) / l_0(z)" if relative else "l_0(z) - l_T(z)"
    factor = {
        "mean": "",
        "sum": " x answer length",
        "capped": f" x min(answer length, {cap_of(context):.4g})",
    }
    text = (
        f"{drop}{factor[config.adaptation.length]}; l_T is the loss of the row's answer after {depth} steps on the "
        f"target with learning rate {rate:g}"
    )
    settings = f"T={depth}, learning rate {rate:g}, {len(setup.parts())} adapters of rank {config.adaptation.lora.rank}"
    found = from_similarity(
        context,
        drops,
        formula={"name": name, "text": text, "settings": settings},
        good=drops.isfinite().all(1),
        tokens=pool.tokens() * (1 + len(setup.parts())),
        groups=groups_of(setup),
    )
    nothing = {row for row, loss in zip(chosen, before.tolist(), strict=True) if loss == 0}
    status = {row: "empty" if row in nothing else state for row, state in found.status.items()}
    return replace(found, status=status)


def columns_of(context: Context, rows: Sequence[int] | None, *, relative: bool) -> Tensor:
    """Return one column per adapter, float32 [rows, adapters], as `Scorer.columns` says.

    Args:
        context: What is scored.
        rows: Pool rows; None for all of them.
        relative: Whether to divide each drop by the loss before the adaptation.
    """
    chosen, places, n = usable_among(context.pool, rows)
    return spread(drops_of(context, chosen, relative=relative)[0], places, n)


def groups_of(setup: Adaptation) -> tuple[list[str], Tensor]:
    """Return the names and groups of the columns: the subtasks if each has its own adapter, otherwise one group.

    Args:
        setup: What the adapters depend on.

    Returns:
        The names of the groups, and the group of each column, int64 [adapters].
    """
    parts = setup.parts()
    groups = [part.group for part in parts]
    if len(set(groups)) < len(groups):  # folds
        return ["target"], torch.tensor(groups)
    return [part.name for part in parts], torch.tensor(groups)


def drops_of(context: Context, chosen: list[int], *, relative: bool) -> tuple[Tensor, Tensor]:
    """Return how far the losses of pool rows fall, and the losses before the adaptation.

    Args:
        context: What is scored.
        chosen: Usable pool rows.
        relative: Whether to divide each drop by the loss before the adaptation.

    Returns:
        The drops, float32 [chosen, adapters], and the losses before, float32 [chosen].

    Raises:
        DataError: The loss of a target row is not finite.
    """
    pool, run = context.pool, context.run
    with run.stage("losses"):
        _refuse_dead_targets(context)
        before = losses(context, "pool", pool, chosen)
    after = []
    with adapted(setup_of(context)) as (module, params):
        with run.stage("adaptation"):
            adapters = prepare_adapters(setup_of(context), module, params)
        with run.stage("losses after adaptation"):
            for _, digest, tensors in adapters:
                put(params, tensors)
                after.append(losses(context, "pool", pool, chosen, module=module, adapter=digest))
    context.merge()
    lengths = torch.from_numpy(pool.scan.supervised[chosen].astype(np.int64))
    length = context.config.adaptation.length
    drops = loss_drop(before, torch.stack(after, 1), lengths, relative=relative, how=length, cap=cap_of(context))
    return drops, before


def cap_of(context: Context) -> float:
    """Return the mean length of the target's answers in tokens.

    Args:
        context: What is scored.
    """
    target = context.wanted
    return float(np.mean(target.scan.supervised[target.usable]))


def _refuse_dead_targets(context: Context) -> None:
    target = context.wanted
    wanted = np.flatnonzero(target.usable).tolist()
    found = losses(context, "target", target, wanted)
    if dead := [row for row, loss in zip(wanted, found.tolist(), strict=True) if not np.isfinite(loss)]:
        raise DataError(
            f"target row {target.pool.where(dead[0])} has a loss that is not finite ({len(dead)} such rows of "
            f"{len(wanted)}); remove it from the target"
        )


def work(context: Context) -> Work:
    """Return the tokens of the forward passes; a token of the adaptation counts as three.

    Args:
        context: What is scored.
    """
    setup = setup_of(context)
    tokens, done = work_tokens(setup)
    whole = {LABEL: tokens}
    left = {LABEL: tokens - done}
    for kind, rows in (("pool", context.pool), ("target", context.wanted)):
        label = f"losses of the {kind}"
        whole[label], left[label] = tokens_of(rows, folder_of(context, kind))
    label, choice = "losses of the pool after adaptation", setup.choice()
    whole[label] = left[label] = 0.0
    for part in setup.parts():
        adapter = "not chosen yet" if choice is None else setup.digest(part, *choice)
        one, missing = tokens_of(context.pool, folder_of(context, "pool", adapter))
        whole[label] += one
        left[label] += missing
    return Work(whole, left)


def reuse(config: SelectConfig) -> list[str]:
    """Return the flags with which another selection uses the losses and adapters of this run.

    Args:
        config: The settings of the finished run.
    """
    return [f"--set features.folder={config.features.folder or config.out / 'features'}"]


def tokens(asked: Asked) -> list[dict[str, Any]]:
    """Return the loss of each token of the answer before and after the adaptation, averaged over the adapters.

    Args:
        asked: The question.

    Raises:
        DataError: The adapters of the run are missing.
    """
    loaded = models.load(asked.config.model)
    home = asked.config.features.folder or asked.folder / "features"
    setup = Adaptation(asked.config, home, asked.pool, asked.target, loaded)
    choice = setup.choice()
    found = [] if choice is None else [kept_adapter(setup.path(setup.digest(part, *choice))) for part in setup.parts()]
    if not found or any(tensors is None for tensors in found):
        raise DataError(f"{setup.folder}: the run's adapters are gone; run the same selection again to explain it")
    batch = asked.pool.batch([asked.index], loaded.model.device)
    with torch.inference_mode():
        before = token_losses(loaded.model, batch)[0].cpu()
    after = []
    with adapted(setup) as (module, params):
        for tensors in found:
            assert tensors is not None
            put(params, tensors)
            with torch.inference_mode():
                after.append(token_losses(module, batch)[0].cpu())
    wanted = batch["input_ids"][0, 1:][batch["labels"][0, 1:] != -100].tolist()
    mean = torch.stack(after).mean(0).tolist()
    return [
        {"token": loaded.tokenizer.decode([token]), "before": one, "after": other}
        for token, one, other in zip(wanted, before.tolist(), mean, strict=True)
    ]
