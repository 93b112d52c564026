"""The arms of an audit: the selection, the baselines, and which rows each of them trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from datatools import SELECTORS, Candidates, DataError, Selection, UsageError, files, select
from pipelines.rows.rows import Rows
from pipelines.runs.seeds import derive_seed
from pipelines.select.scored import Context, Scored, candidates
from pipelines.select.scorer import scorer
from pipelines.settings.audit import AuditConfig
from pipelines.settings.methods import FULL, known
from pipelines.settings.parts import TrainingConfig
from pipelines.settings.select import FeaturesConfig, SelectConfig

SELECTED, BASE = "selected", "untrained"
SLOWER = "slower"
"""The group of the runs at a quarter of the learning rate."""


@dataclass(frozen=True)
class Task:
    """One training run.

    Attributes:
        arm: whose it is.
        seed: of the adapters' start, and of the order of the rows.
        rows: rows of the pool.
        recipe: how they are trained on.
        note: what its label says besides.
        group: what it is for: "" for the comparison of arms, else a check.
        planned: whether its rows stand for as many others, which scores will choose.
    """

    arm: str
    seed: int
    rows: list[int]
    recipe: TrainingConfig
    note: str = ""
    group: str = ""
    planned: bool = False

    def label(self, place: int, runs: int) -> str:
        """Return the label of its progress bars.

        Args:
            place: The number of the run, from 1.
            runs: How many runs there are.
        """
        return f"{place} of {runs}: {self.arm}, seed {self.seed}{self.note}"


def as_select(config: AuditConfig, arm: str) -> SelectConfig:
    """Return the settings that the scorer of an arm reads.

    Args:
        config: The settings of the audit.
        arm: The method.
    """
    return SelectConfig(
        features=FeaturesConfig(folder=config.features),
        model=config.model,
        train=config.pool,
        target=config.target,
        out=config.out,
        seed=config.seed,
        method=arm,
    )


def rows_of(selected: Path, pool: Rows) -> tuple[list[int], str]:
    """Return the rows of the pool whose lines are in `selected`, in that order, and the digest of that file.

    Args:
        selected: The file of the selection.
        pool: The pool.

    Raises:
        UsageError: There is no such file.
        DataError: A line is not in the pool, or this model cannot be trained on it.
    """
    places: dict[str, list[int]] = {}
    for i in np.flatnonzero(pool.usable).tolist():
        places.setdefault(files.digest(pool.pool.raw(i)), []).append(i)
    if not selected.is_file():
        raise UsageError(f"--selected {selected}: no such file; give the selected.jsonl of a run")
    found = []
    content = files.read_bytes(selected)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        rows = places.get(files.digest(line))
        if not rows:
            _refuse_unusable(f"{selected}:{number}", files.digest(line), pool)
            raise DataError(
                f"{selected}:{number} is not a row of the pool; give --pool the files that it was selected from"
            )
        found.append(rows.pop(0))
    if not found:
        raise DataError(f"{selected}: holds no row that can be trained on")
    return found, files.digest(content)


def _refuse_unusable(where: str, digest: str, pool: Rows) -> None:
    """Refuse a chosen row that the pool has and that this model cannot be trained on, as the selecting model could."""
    for i in np.flatnonzero(~pool.usable).tolist():
        if files.digest(pool.pool.raw(i)) == digest:
            raise DataError(
                f"{where} is {pool.pool.where(i)} of the pool, which is left out here (by this model, its template or "
                "max_length, or as a duplicate); read the pool as the selection did, or select again"
            )


def is_scored(arm: str) -> bool:
    """Return whether the rows of the arm are chosen by a score.

    Args:
        arm: The arm.
    """
    return arm not in (SELECTED, FULL) and not _draws(arm)


def _draws(arm: str) -> bool:
    """Return whether every seed of the arm draws other rows: its selector uses neither scores nor similarities."""
    if arm == FULL:
        return False
    selector = SELECTORS[known(arm).selector]
    return not (selector.scores or selector.similarity)


class Scores:
    """The scores of the arms, each computed once.

    Args:
        contexts: what the scorer of each arm is given.
    """

    def __init__(self, contexts: Mapping[str, Context]) -> None:
        self._contexts, self._known = contexts, dict[str, Scored]()

    def of(self, arm: str) -> Scored:
        """Return the scores of the pool by the method of an arm.

        Args:
            arm: The method.
        """
        if arm not in self._known:
            self._known[arm] = scorer(arm).score(self._contexts[arm])
        return self._known[arm]

    def candidates(self, arm: str, pool: Rows) -> Candidates:
        """Return what the selector of an arm chooses from.

        Args:
            arm: The method.
            pool: The rows.
        """
        target = self._contexts[arm].target if SELECTORS[known(arm).selector].similarity else None
        return candidates(pool, self.of(arm), target)


def rows_by_seed(
    scores: Scores, pool: Rows, config: AuditConfig, arm: str, chosen: list[int]
) -> list[tuple[int, list[int]]]:
    """Return (seed, rows) of each training run of an arm.

    Args:
        scores: The scores of the arms.
        pool: The rows.
        config: The settings.
        arm: The arm.
        chosen: The rows of the selection.
    """
    seeds = range(config.seed, config.seed + config.seeds)
    if arm == SELECTED:
        return [(seed, chosen) for seed in seeds]
    if arm == FULL:
        return [(config.seed, np.flatnonzero(pool.usable).tolist())]
    reference = Selection(torch.tensor(chosen))
    budget, selector = str(len(chosen)), known(arm).selector
    if _draws(arm):
        drawn = [
            select(selector, candidates(pool), budget, seed=derive_seed(seed, "audit", arm), reference=reference)
            for seed in seeds
        ]
        return [(seed, found.indices.tolist()) for seed, found in zip(seeds, drawn, strict=True)]
    best = select(selector, scores.candidates(arm, pool), budget).indices.tolist()
    return [(seed, best) for seed in seeds]


def tasks(
    scores: Scores,
    pool: Rows,
    config: AuditConfig,
    against: Sequence[str],
    chosen: list[int],
    *,
    planned: bool = False,
) -> list[Task]:
    """Return all training runs, in order.

    Args:
        scores: of the arms.
        pool: the rows.
        config: the settings.
        against: the arms besides the selection.
        chosen: the rows of the selection.
        planned: compute no score: of an arm that is scored, the rows of the selection stand for as many others.
    """
    found = []
    for arm in (SELECTED, *against):
        recipe = config.training if arm != FULL else one_pass(config.training)
        stands_for_others = planned and is_scored(arm)
        if stands_for_others:
            rows = [(seed, chosen) for seed in range(config.seed, config.seed + config.seeds)]
        else:
            rows = rows_by_seed(scores, pool, config, arm, chosen)
        found += [Task(arm, seed, one, recipe, planned=stands_for_others) for seed, one in rows]
    return found


def slower(found: Sequence[Task]) -> list[Task]:
    """Return the same runs at a quarter of the learning rate, without the whole pool.

    Args:
        found: The training runs.
    """
    return [
        replace(one, recipe=quarter(one.recipe), note=", a quarter of the learning rate", group=SLOWER)
        for one in found
        if one.arm != FULL
    ]


def one_pass(recipe: TrainingConfig) -> TrainingConfig:
    """Return the recipe of the arm `full`: one epoch, however many the other arms have; the table says so.

    Args:
        recipe: The recipe of the other arms.
    """
    return recipe.model_copy(update={"epochs": 1})


def quarter(recipe: TrainingConfig) -> TrainingConfig:
    """Return the recipe at a quarter of its learning rate.

    Args:
        recipe: The recipe.
    """
    return recipe.model_copy(update={"learning_rate": recipe.learning_rate / 4})
