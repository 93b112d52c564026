"""Where selections are compared: each is trained on with one recipe, and measured on the same held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import files
from datatools.files import sealed
from pipelines.engines.units import Job, taken
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.models.base import unload
from pipelines.rows.rows import Rows
from pipelines.runs import following, workers
from pipelines.runs.progress import progress
from pipelines.settings.parts import LoraConfig, TrainingConfig
from pipelines.training import evaluation
from pipelines.training.accuracy import measure
from pipelines.training.accuracy.measure import Measured
from pipelines.training.checkpoint_files import is_complete
from pipelines.training.train import train_adapter

_BUDGET = 2048  # padded tokens per batch of held-out rows


@dataclass(frozen=True)
class Result:
    """One model on the held-out rows.

    Attributes:
        loss: the mean loss over their supervised tokens.
        tokens: how many these are.
        sums: float64 [n], the sum of the losses of each row.
        counts: float64 [n], the supervised tokens of each row.
        measured: the accuracies.
        rows: how many rows it was trained on.
        trained_tokens: how many tokens it was trained on, over all epochs.
    """

    loss: float
    tokens: int
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    measured: dict[str, Measured]
    rows: int = 0
    trained_tokens: int = 0

    def said(self) -> dict[str, Any]:
        """Return what `audit.json` holds of the run."""
        found = {"loss": self.loss, "tokens": self.tokens, "rows": self.rows, "trained_tokens": self.trained_tokens}
        accuracies = {name: {"accuracy": one.accuracy, **one.more} for name, one in self.measured.items()}
        return found | ({"metrics": accuracies} if accuracies else {})


@dataclass(frozen=True)
class Wanted:
    """A training run whose result is needed, or the measurement of the untrained model.

    Attributes:
        folder: where its adapter and measurements are kept.
        done: returns whether they are there.
        make: makes them.
    """

    folder: Path
    done: Callable[[], bool]
    make: Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """One base model, one pool and one set of held-out rows.

    Adapters and measurements are kept under the hash of all that makes them, so a killed run continues, and an arm with
    the rows of another costs nothing.

    Attributes:
        lora: the adapters that are trained.
        home: the folder in which they are kept.
        loaded: the base model.
        pool: the rows that are trained on.
        test: the held-out rows.
        plan: what is measured besides the loss.
    """

    lora: LoraConfig
    home: Path
    loaded: models.LoadedModel
    pool: Rows
    test: Rows
    plan: measure.Plan

    def base(self, label: str) -> Result:
        """Measure the model before any training.

        Args:
            label: The name of its progress bars.
        """
        return self._measured(self._base, self.loaded.model, label)

    @property
    def _base(self) -> Path:
        return self.home / f"base-{_short(dict(self.loaded.digests))}"

    def wanted_base(self, label: str) -> Wanted:
        """Return the measurement of the untrained model as work for `prepare`.

        Args:
            label: As in `base`.
        """
        return Wanted(self._base, lambda: self.is_measured(self._base), lambda: self.base(label))

    def wanted(self, rows: list[int], recipe: TrainingConfig, seed: int, label: str) -> Wanted:
        """Return a training run as work for `prepare`.

        Args:
            rows: As in `run`.
            recipe: As in `run`.
            seed: As in `run`.
            label: As in `run`.
        """
        folder = self.folder(rows, recipe, seed)
        return Wanted(folder, lambda: self.is_measured(folder), lambda: self.run(rows, recipe, seed, label))

    def run(self, rows: list[int], recipe: TrainingConfig, seed: int, label: str, pool: Rows | None = None) -> Result:
        """Train fresh adapters on `rows` and measure them.

        Args:
            rows: the rows, in the order in which a selection names them.
            recipe: how they are trained on.
            seed: of the adapters' start and the order of the rows.
            label: what progress bars are called.
            pool: the rows' pool, where it is another.
        """
        source = pool or self.pool
        folder = self.folder(rows, recipe, seed, pool)
        trained = {"rows": len(rows), "trained_tokens": int(source.scan.tokens[rows].sum()) * recipe.epochs}
        if self.is_measured(folder):
            with suppress(sealed.Damaged):  # then it is measured again
                return self._measured(folder, None, label, **trained)
        train_adapter(self.loaded, source, rows, recipe, self.lora, folder / "adapter", seed=seed, label=label)
        module = load_adapter(self.loaded.model, folder / "adapter")
        try:
            return self._measured(folder, module, label, **trained)
        finally:
            unload(module)

    def folder(self, rows: list[int], recipe: TrainingConfig, seed: int, pool: Rows | None = None) -> Path:
        """Return the folder of a run's adapter and measurements, named after everything that determines them.

        Args:
            rows: The rows, in order.
            recipe: How they are trained on.
            seed: Of the adapters' start and the order of the rows.
            pool: The rows' pool, where it is another.
        """
        keys = (pool or self.pool).keys
        made_of = {
            "model": dict(self.loaded.digests),
            "lora": self.lora.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "seed": seed,
            "rows": [keys[i] for i in rows],
        }
        return self.home / _short(made_of)

    def is_trained(self, folder: Path) -> bool:
        """Return whether the adapter exists.

        Args:
            folder: The folder of the run.
        """
        return is_complete(folder / "adapter")

    def is_measured(self, folder: Path) -> bool:
        """Return whether all measurements exist.

        Args:
            folder: The folder of the run.
        """
        return all((folder / f"{name}.json").is_file() for name in [self._losses, *self.plan.names.values()])

    @property
    def _losses(self) -> str:
        usable = np.flatnonzero(self.test.usable).tolist()
        return f"losses-{_short([self.test.keys[i] for i in usable])}"  # content, not files: other templates differ

    def _measured(self, folder: Path, model: Any, label: str, *, rows: int = 0, trained_tokens: int = 0) -> Result:
        """Measurements of an earlier attempt, or new ones; with `model` None, those of an earlier attempt alone."""

        def keep(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            path = folder / f"{name}.json"
            if path.is_file():
                try:
                    return sealed.read_json(path)
                except sealed.Damaged:
                    if model is None:
                        raise
            value = make()
            files.make_folder(folder)
            sealed.write_json(path, value)
            return value

        def losses() -> dict[str, Any]:
            found = evaluation.losses(model, self.test, token_budget=_BUDGET, label=f"losses, {label}", by_row=True)
            sums, counts = found["by_row"]
            return {
                "loss": found["loss"],
                "tokens": found["tokens"],
                "sums": sums.tolist(),
                "counts": counts.tolist(),
            }

        found = keep(self._losses, losses)
        if "sums" not in found:  # of an earlier version
            if model is None:
                raise sealed.Damaged(f"{folder / self._losses}.json has no losses of single rows")
            found = losses()
            sealed.write_json(folder / f"{self._losses}.json", found)
        return Result(
            float(found["loss"]),
            int(found["tokens"]),
            np.asarray(found["sums"], dtype=np.float64),
            np.asarray(found["counts"], dtype=np.float64),
            measure.measure(model, self.plan, keep=keep, label=label),
            rows,
            trained_tokens,
        )


def prepare(home: Path, wanted: Sequence[Wanted], name: str) -> None:
    """Share training runs among the members of a team; by itself, a process makes each when its result is needed.

    Args:
        home: The folder in which they are kept.
        wanted: The runs. Those with the same folder are one unit of work.
        name: The name of the job.
    """
    if workers.member() is None:
        return
    units: dict[Path, list[Wanted]] = {}
    for one in wanted:
        units.setdefault(one.folder, []).append(one)
    ordered = list(units.values())

    def committed(unit: int) -> bool:
        return all(one.done() for one in ordered[unit])

    missing = [unit for unit in range(len(ordered)) if not committed(unit)]
    with progress("training runs of all workers", len(ordered), "runs", done=len(ordered) - len(missing)) as bar:
        for unit in taken(
            Job(name, home, missing, committed, lambda unit: bar.advance(1, workers=following.working()))
        ):
            for one in ordered[unit]:
                if not one.done():
                    one.make()
            bar.advance()


def _short(value: object) -> str:
    return files.digest(files.json_bytes(value))[:16]
