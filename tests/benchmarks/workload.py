"""The model, rows and optimizer state that the model benchmarks share."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import optim
from datatools import PROJECTORS, EnvironmentProblem, GradientFeatures, covered, extract
from optim import UpdateMap
from pipelines.models import load as models
from pipelines.models.lora import add_lora
from pipelines.models.losses import row_losses
from pipelines.rows.prepare import prepare
from pipelines.rows.rows import Rows
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig
from tests.benchmarks.measure import Settings
from tests.conftest import REPOSITORY, shared_folder
from tests.tiny import save_tiny_model, write_rows

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK = 8
DIM = 8192
TOKEN_BUDGET = 1024


@dataclass
class Workload:
    """A LoRA model after two AdamW steps, and rows to take gradients of."""

    model: Any
    rows: Rows
    first: dict[str, int]
    """Content hash -> row, longest first: what a run extracts, in its order."""
    updates: UpdateMap
    optimizer: torch.optim.Optimizer
    projector: Any
    lengths: dict[str, int]

    @property
    def names(self) -> list[str]:
        return list(self.updates.params)

    @property
    def items(self) -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) of each row, in file order."""
        return [self.rows.item(i) for i in sorted(self.first.values())]

    @property
    def tokens(self) -> int:
        return sum(self.lengths.values())

    @property
    def answer_tokens(self) -> int:
        return sum(int(self.rows.scan.supervised[i]) for i in self.first.values())

    def described(self) -> dict[str, Any]:
        lengths = sorted(self.lengths.values())
        return {
            "rows": len(lengths),
            "tokens": self.tokens,
            "answer tokens": self.answer_tokens,
            "shortest row": lengths[0],
            "median row": lengths[len(lengths) // 2],
            "longest row": lengths[-1],
            "LoRA rank": RANK,
            "matrices": len(self.names),
            "coordinates a row": sum(p.numel() for p in self.updates.params.values()),
            "feature numbers a row": DIM,
            "token budget": TOKEN_BUDGET,
        }

    def store(self, folder: Path, *, dtype: str = "float16") -> GradientFeatures:
        return GradientFeatures.create_or_open(folder, meta={}, dim=DIM, dtype=dtype, keys=list(self.first))

    def fetch(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The batch as a run makes it: rows are read from disk and encoded again."""
        return self.rows.batch([self.first[key] for key in keys])

    def extract(self, folder: Path, *, dtype: str = "float16") -> dict[str, float]:
        """One pass of `datatools.extract` into a new store; seconds of each part."""
        self.model.eval()
        store, clock = self.store(folder, dtype=dtype), Clock()
        started = perf_counter()
        extract(
            _Store(store, clock),
            self.model,
            row_losses,
            clock.around("fetch", self.fetch),
            self.lengths,
            _Updates(self.updates, clock),
            _Projector(self.projector, clock),
            token_budget=TOKEN_BUDGET,
        )
        whole = perf_counter() - started
        return clock.seconds | {"forward + backward": whole - sum(clock.seconds.values())}


def prepared(settings: Settings, folder: Path, *, rows: int, sample_seed: int = 0) -> Workload:
    """SmolLM2-135M (or the tiny model) with adapters on q, k, v, o, and `rows` rows drawn at random.

    The rows come from `data/train/mix-1k.jsonl` of the shared folder, else from the demo's pool. Skips, saying so, when
    the model is not installed.
    """
    if settings.model == "tiny":
        config = ModelConfig(name=str(save_tiny_model(folder / "model")))
        file = write_rows(folder / "rows.jsonl", rows)
    else:
        config = ModelConfig(name="smollm2")
        file = _sample(_pool(), rows, folder / "rows.jsonl", sample_seed)
    try:
        loaded = models.load(config)
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    found = prepare(DataConfig(paths=[str(file)]), config, loaded.tokenizer, cache=folder / "cache", label="rows")
    model = add_lora(loaded.model, LoraConfig(rank=RANK, targets=TARGETS), seed=0)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = covered(model, list(params))
    assert names == list(params), "hooks must see every adapter, or the arms would do different work"
    first = found.unique()
    optimizer = optim.create("adamw", list(params.items()), lr=1e-3)
    for _ in range(2):  # moments that are not zero, and lora_B that is not
        optimizer.zero_grad()
        short = found.batch(list(first.values())[-4:])  # the shortest rows: no peak of memory before the measurement
        row_losses(model, short).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return Workload(
        model=model.eval(),
        rows=found,
        first=first,
        updates=UpdateMap.of(optimizer),
        optimizer=optimizer,
        projector=PROJECTORS["sjlt"].of({name: p.shape for name, p in params.items()}, DIM, 0),
        lengths={key: int(found.scan.tokens[i]) for key, i in first.items()},
    )


def _pool() -> Path:
    shared = shared_folder() / "data" / "train" / "mix-1k.jsonl"
    return shared if shared.is_file() else REPOSITORY / "pipelines" / "demo_data" / "pool.jsonl"


def pool_name(settings: Settings) -> str:
    """Where the rows come from, without this machine's paths."""
    return "tests.tiny.write_rows" if settings.model == "tiny" else _pool().name


def _sample(pool: Path, count: int, to: Path, seed: int) -> Path:
    lines = pool.read_text(encoding="utf-8").splitlines()
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(lines))[:count]
    to.write_text("".join(lines[i] + "\n" for i in sorted(chosen.tolist())), encoding="utf-8")
    return to


def folder_bytes(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- where the time of one pass goes


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - started

        return timed


class _Around:
    """An object as it is, but for what a subclass times."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self.inner, self.clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Store(_Around):
    def write_unit(self, *args: Any, **kwargs: Any) -> None:
        self.clock.around("write", self.inner.write_unit)(*args, **kwargs)


class _Updates(_Around):
    def per_sample(self, grads: Any) -> Any:
        return self.clock.around("update", self.inner.per_sample)(grads)


class _Projector(_Around):
    def accumulate(self, *args: Any) -> None:
        self.clock.around("projection", self.inner.accumulate)(*args)
