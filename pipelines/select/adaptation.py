"""Adapters that take a few training steps on the target rows: their depth, learning rate, rows, and storage.

The depth and the learning rate are those with the highest specificity on held-out target rows
(`datatools.specificity`). Results are kept in `adapters/` of the features folder under digests of everything they
depend on: an interrupted run continues with the next walk, and other runs on the same target and model train nothing.

Source: TACS, arXiv 2605.09404. Differs: the generic rows are drawn from the pool, the adapter has no dropout, and the
default grid is smaller than the published one (depths 2 to 64, rates 1e-5, 2e-5 and 5e-5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datatools import DataError, files, most_specific, specificity
from datatools.files import sealed
from optim import create
from pipelines.engines.units import Job, taken
from pipelines.models import load as models
from pipelines.models.base import unload
from pipelines.models.lora import add_lora, lora_parameters
from pipelines.models.losses import row_losses
from pipelines.rows.rows import Rows
from pipelines.runs.memory import token_budget
from pipelines.runs.progress import Progress, progress
from pipelines.runs.seeds import derive_seed
from pipelines.settings.select import SelectConfig

FORMAT = "1"
LABEL = "adapting to the target"


@dataclass(frozen=True)
class Part:
    """The target rows of one adapter.

    Attributes:
        name: The name of its column.
        group: The group of its column.
        rows: The target rows to train on.
        held: The other target rows, on which a fold is evaluated.
    """

    name: str
    group: int
    rows: list[int]
    held: list[int]


@dataclass(frozen=True)
class Adaptation:
    """What adapters depend on.

    Attributes:
        config: The settings of the selection.
        home: The features folder.
        pool: The pool, from which the generic rows are drawn.
        target: The target.
        loaded: The model.
    """

    config: SelectConfig
    home: Path
    pool: Rows
    target: Rows
    loaded: models.LoadedModel

    @property
    def folder(self) -> Path:
        """The folder in which adapters and walks are kept."""
        return self.home / "adapters"

    @property
    def calibrated(self) -> bool:
        """Whether the depth and the rate are chosen, rather than given."""
        how = self.config.adaptation
        return len(how.depths) * len(how.learning_rates) > 1

    def parts(self) -> list[Part]:
        """Return the adapters to train, one per column."""
        every = self._ordered()
        how = self.config.adaptation.adapters
        if how == "fold":
            folds = self.folds()
            return [Part(f"without fold {i + 1}", 0, part.rows, part.held) for i, part in enumerate(folds)]
        if how == "subtask":
            of = {row: self.target.pool[row].subtask or "target" for row in every}
            names = sorted(set(of.values()))
            return [Part(name, i, [row for row in every if of[row] == name], []) for i, name in enumerate(names)]
        return [Part("target", 0, every, [])]

    def folds(self) -> list[Part]:
        """Return the target without each fold in turn; every subtask is spread over the folds.

        Raises:
            DataError: The target has one row.
        """
        every = self._ordered()
        count = min(self.config.adaptation.folds, len(every))
        if count < 2:
            raise DataError(
                f"adaptation.folds={self.config.adaptation.folds}: the target has {len(every)} distinct row, and folds "
                "need at least 2; give more target rows, or one depth and one learning rate (--set "
                "adaptation.depths=[16] --set adaptation.learning_rates=[5e-5]) and adaptation.adapters=target"
            )
        by_subtask = sorted(every, key=lambda row: self.target.pool[row].subtask or "target")  # stable
        dealt = [by_subtask[i::count] for i in range(count)]
        return [Part(f"fold {i + 1}", 0, [r for r in every if r not in held], held) for i, held in enumerate(dealt)]

    def walks(self) -> list[tuple[int, float]]:
        """Return the (fold, learning rate) of each walk of the calibration; none if nothing is to be chosen."""
        if not self.calibrated:
            return []
        return [(fold, rate) for rate in self.config.adaptation.learning_rates for fold in range(len(self.folds()))]

    def walk_path(self, fold: int, rate: float) -> Path:
        """Return where the specificities along a walk are kept.

        Args:
            fold: The number of the fold that is held out.
            rate: The learning rate.
        """
        part = self.folds()[fold]
        facts = {"held": self._keys(part.held), "generic": [self.pool.keys[i] for i in self.generic()]}
        return self.folder / f"walk-{self._digest(part.rows, rate, self.config.adaptation.depths, facts)}.json"

    def path(self, digest: str) -> Path:
        """Return where an adapter is kept.

        Args:
            digest: As `digest` returns it.
        """
        return self.folder / f"adapter-{digest}.safetensors"

    def digest(self, part: Part, depth: int, rate: float) -> str:
        """Return the name of an adapter: a digest of everything it depends on.

        Args:
            part: Its target rows.
            depth: The number of training steps.
            rate: The learning rate.
        """
        return self._digest(part.rows, rate, [depth], {})

    def generic(self) -> list[int]:
        """Return rows of the pool, drawn by content, so that a pool that grows keeps most of them."""
        salt = derive_seed(self.config.seed, "generic rows")
        drawn = sorted(self.pool.unique().items(), key=lambda item: files.digest(f"{salt}/{item[0]}".encode()))
        return [row for _, row in drawn[: self.config.adaptation.generic_rows]]

    def choice(self) -> tuple[int, float] | None:
        """Return the depth and the learning rate; None while a walk is missing."""
        how = self.config.adaptation
        if not self.calibrated:
            return how.depths[0], how.learning_rates[0]
        cells: dict[tuple[int, float], list[float]] = {}
        for fold, rate in self.walks():
            if (found := _read(self.walk_path(fold, rate))) is None:
                return None
            for depth in how.depths:
                cells.setdefault((depth, rate), []).append(float(found["specificity"][str(depth)]))
        return most_specific(cells)

    def _ordered(self) -> list[int]:
        return sorted(self.target.unique().values(), key=lambda row: self.target.keys[row])

    def _keys(self, rows: Sequence[int]) -> list[str]:
        return [self.target.keys[row] for row in rows]

    def _digest(self, rows: Sequence[int], rate: float, depths: Sequence[int], more: dict[str, Any]) -> str:
        how = self.config.adaptation
        facts = {
            "format": FORMAT,
            "model": dict(sorted(self.loaded.digests.items())),
            "precision": str(self.loaded.model.dtype),
            "encoding": self.target.encoder.fingerprint(),
            "rows": self._keys(rows),
            "lora": how.lora.model_dump(mode="json"),
            "batch_size": how.batch_size,
            "token_budget": self.config.features.token_budget,
            "rate": rate,
            "depths": sorted(depths),
            "seed": self.config.seed,
            **more,
        }
        return files.digest(files.json_bytes(facts))[:16]


def _read(path: Path) -> dict[str, Any] | None:
    """Return the result of a walk; None if it is missing or damaged, so that the walk is repeated."""
    if not path.is_file():
        return None
    try:
        return sealed.read_json(path)
    except sealed.Damaged:
        return None


def kept_adapter(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of an adapter; None if it is missing or damaged, so that it is trained again.

    Args:
        path: Its file.
    """
    if not path.is_file():
        return None
    try:
        return sealed.read_tensors(path)
    except sealed.Damaged:
        return None


@contextmanager
def adapted(setup: Adaptation) -> Iterator[tuple[Any, dict[str, torch.nn.Parameter]]]:
    """Yield the model with fresh adapters and their matrices by name; remove the adapters afterwards.

    Args:
        setup: What the adapters depend on.

    Raises:
        DataError: No layer of the model can have an adapter.
    """
    config = setup.config
    try:
        module = add_lora(setup.loaded.model, config.adaptation.lora, seed=derive_seed(config.seed, "adaptation"))
    except DataError as error:
        raise DataError(f"adaptation.{error}") from error  # "lora.targets ..."
    try:
        module.eval()
        yield module, lora_parameters(module)
    finally:
        unload(module)


def put(params: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy values into the adapters.

    Args:
        params: The matrices of the adapters by name.
        tensors: The values, of the same names and shapes.
    """
    with torch.no_grad():
        for name, parameter in params.items():
            parameter.copy_(tensors[name])


def prepare_adapters(
    setup: Adaptation, module: Any, params: dict[str, torch.nn.Parameter]
) -> list[tuple[Part, str, dict[str, Tensor]]]:
    """Return all adapters as (part, digest, tensors), and train those that are not kept yet.

    Args:
        setup: What they depend on.
        module: The model with fresh adapters.
        params: Their matrices.
    """
    files.make_folder(setup.folder)
    fresh = {name: p.detach().clone() for name, p in params.items()}
    walks, (total, done) = setup.walks(), work_tokens(setup)
    with progress(LABEL, round(total), "tokens", done=round(done)) as bar:
        for unit in taken(_job(setup, "walks", len(walks), lambda unit: _read(setup.walk_path(*walks[unit])))):
            put(params, fresh)
            _walk(setup, module, params, *walks[unit], bar)
        choice = setup.choice()
        assert choice is not None
        (depth, rate), parts = choice, setup.parts()
        digests = [setup.digest(part, depth, rate) for part in parts]
        for unit in taken(_job(setup, "adapters", len(parts), lambda i: kept_adapter(setup.path(digests[i])))):
            put(params, fresh)
            _train(setup, module, params, parts[unit].rows, rate, depth, bar, lambda step: None)
            tensors = {name: p.detach().cpu().clone() for name, p in params.items()}
            sealed.write_tensors(setup.path(digests[unit]), tensors)
    return [(part, one, sealed.read_tensors(setup.path(one))) for part, one in zip(parts, digests, strict=True)]


def _job(setup: Adaptation, name: str, count: int, read: Callable[[int], object | None]) -> Job:
    """Return `count` results, each of which `read` returns once it is kept, as a job."""
    missing = [unit for unit in range(count) if read(unit) is None]
    return Job(name, setup.folder, missing, lambda unit: read(unit) is not None)


def _walk(
    setup: Adaptation, module: Any, params: dict[str, torch.nn.Parameter], fold: int, rate: float, bar: Progress
) -> None:
    """Train on the target without one fold, and keep the specificity at each depth."""
    part, generic = setup.folds()[fold], setup.generic()
    depths = setup.config.adaptation.depths
    found: dict[str, float] = {}

    def look(step: int) -> None:
        if step in depths:
            grads = [
                _gradient(setup, module, list(params.values()), rows, chosen, bar)
                for rows, chosen in ((setup.target, part.rows), (setup.target, part.held), (setup.pool, generic))
            ]
            found[str(step)] = specificity(*grads)

    _train(setup, module, params, part.rows, rate, max(depths), bar, look)
    sealed.write_json(setup.walk_path(fold, rate), {"specificity": found, "rate": rate, "fold": fold})


def _train(
    setup: Adaptation,
    module: Any,
    params: dict[str, torch.nn.Parameter],
    chosen: Sequence[int],
    rate: float,
    depth: int,
    bar: Progress,
    after: Callable[[int], None],
) -> None:
    """Take `depth` AdamW steps at a constant rate on batches that are reshuffled in each pass; call `after(step)`.

    Raises:
        DataError: The loss or a weight is not finite.
    """
    optimizer = create("adamw", list(params.items()), lr=rate)
    seed = derive_seed(setup.config.seed, "adaptation rows")
    generator = np.random.Generator(np.random.Philox(seed))
    queue: list[int] = []
    size = min(setup.config.adaptation.batch_size, len(chosen))
    for step in range(1, depth + 1):
        if len(queue) < size:
            queue += [chosen[i] for i in generator.permutation(len(chosen))]
        rows, queue = queue[:size], queue[size:]
        for parameter in params.values():
            parameter.grad = None
        total = 0.0
        for group, batch in setup.target.micro_batches(rows, setup.config.features.token_budget, module.device):
            with torch.enable_grad():
                loss = row_losses(module, batch).sum() / len(rows)
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            bar.advance(3 * sum(int(setup.target.scan.tokens[rows[i]]) for i in group))
        optimizer.step()
        if not np.isfinite(total) or not all(bool(p.isfinite().all()) for p in params.values()):
            raise DataError(
                f"{LABEL}: loss {total} or a weight is not finite at step {step} with learning rate {rate:g}; lower "
                "adaptation.learning_rates, or remove the target row that causes it (of "
                f"{', '.join(setup.target.pool.where(row) for row in rows[:3])})"
            )
        after(step)
    for parameter in params.values():
        parameter.grad = None


def _gradient(
    setup: Adaptation, module: Any, params: list[Any], rows: Rows, chosen: Sequence[int], bar: Progress
) -> Tensor:
    """Return the gradient of the mean loss over some rows: float32, all adapters in one vector."""
    total = [torch.zeros_like(p, dtype=torch.float32) for p in params]

    def add(group: list[int], batch: dict[str, Tensor]) -> None:
        with torch.enable_grad():
            loss = row_losses(module, batch).sum() / len(chosen)
            grads = torch.autograd.grad(loss, params, allow_unused=True)
        # all converted before any is added: a batch that does not fit is repeated in parts, and must not count twice
        found = [(held, grad.float()) for held, grad in zip(total, grads, strict=True) if grad is not None]
        for held, grad in found:
            held += grad
        bar.advance(3 * sum(int(rows.scan.tokens[chosen[i]]) for i in group))

    rows.each_batch(add, chosen, token_budget(setup.config.features.token_budget, LABEL), module.device)
    return torch.cat([one.flatten() for one in total]).cpu()


def work_tokens(setup: Adaptation) -> tuple[float, float]:
    """Return the cost of the adapters, total and done, in tokens of a forward pass (a training token counts as 3).

    Args:
        setup: What they depend on.
    """
    how, target = setup.config.adaptation, setup.target
    tokens = target.scan.tokens

    def steps(rows: Sequence[int], count: int) -> float:
        return 3 * count * min(how.batch_size, len(rows)) * float(np.mean(tokens[list(rows)]))

    whole = done = 0.0
    if setup.calibrated:
        looked = 3 * float(setup.pool.scan.tokens[setup.generic()].sum() + tokens[list(target.unique().values())].sum())
        folds = setup.folds()
        for fold, rate in setup.walks():
            cost = steps(folds[fold].rows, max(how.depths)) + len(how.depths) * looked
            whole += cost
            done += cost if setup.walk_path(fold, rate).is_file() else 0.0
    choice = setup.choice()
    for part in setup.parts():
        cost = steps(part.rows, max(how.depths) if choice is None else choice[0])
        whole += cost
        done += cost if choice is not None and setup.path(setup.digest(part, *choice)).is_file() else 0.0
    return whole, done
