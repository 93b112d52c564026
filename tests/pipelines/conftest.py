"""A small world for runs of whole pipelines, and a cheap way to run many command lines in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig
from pipelines.settings.select import ProjectorConfig, SelectConfig, WarmupConfig
from tests.tiny import save_tiny_model, write_rows

Command = Callable[..., SimpleNamespace]


@dataclass(frozen=True)
class World:
    """A folder with `model`, `pool.jsonl` (60 rows, 3 sources), `target.jsonl` (3 rows) and `test.jsonl` (4 rows)."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def pool(self) -> Path:
        return self.folder / "pool.jsonl"

    @property
    def target(self) -> Path:
        return self.folder / "target.jsonl"

    @property
    def test(self) -> Path:
        return self.folder / "test.jsonl"

    def select(self, out: Path, **changes: Any) -> SelectConfig:
        """Settings of a selection by LESS that takes a second: 16 warm-up rows, 2 epochs, 256 dimensions."""
        settings: dict[str, Any] = {
            "model": ModelConfig(name=str(self.model)),
            "train": DataConfig(paths=[str(self.pool)]),
            "target": [str(self.target)],
            "budget": "10%",
            "method": "less",
            "out": out,
            "warmup": WarmupConfig(minimum_rows=16, epochs=2, batch_size=4),
            "projector": ProjectorConfig(dim=256),
            "lora": LoraConfig(rank=4),
        }
        return SelectConfig(**settings | changes)

    def argv(self, command: str, *more: str | Path, out: Path) -> list[str]:
        """The same, or a training run, or an evaluation, as a command line."""
        data = {
            "select": [
                "--train",
                self.pool,
                "--target",
                self.target,
                "--budget",
                "10%",
                "--method",
                "less",
                "--dim",
                256,
                "--lora-rank",
                4,
                "--set",
                "warmup.minimum_rows=16",
                "--epochs",
                2,
                "--batch-size",
                4,
            ],
            "train": ["--data", self.pool, "--epochs", 1, "--lora-rank", 4],
        }
        return [str(part) for part in (command, "--model", self.model, *data[command], "--out", out, *more)]


def make_world(folder: Path) -> World:
    folder.mkdir(exist_ok=True)
    world = World(folder)
    save_tiny_model(world.model)
    write_rows(world.pool, 60)
    write_rows(world.target, 3, source="t", start=500)
    write_rows(world.test, 4, source="u", start=700)
    return world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Read only: a test that changes a file makes a world of its own (`own_world`)."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world")


@contextmanager
def commands() -> Iterator[Command]:
    """A server for command lines; `call("select", ..., kill_after=0.5)` runs in its own process (see forkserver.py)."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forkserver.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None and process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"ready": True}

    def call(*argv: str | Path, **options: Any) -> SimpleNamespace:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"argv": [str(a) for a in argv], **options}) + "\n")
        process.stdin.flush()
        return SimpleNamespace(**json.loads(process.stdout.readline()))

    yield call
    with process:  # closes its pipes, and waits for its end
        process.stdin.close()


@pytest.fixture(scope="session")
def command() -> Iterator[Command]:
    with commands() as call:
        yield call
