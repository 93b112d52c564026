"""A small world for training, and a finished run."""

import pytest

from pipelines.training import train
from tests.pipelines.conftest import make_world
from tests.pipelines.training.runs import settings


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A world with `few.jsonl`, 24 rows."""
    made = make_world(tmp_path_factory.mktemp("world"))
    lines = made.pool.read_text().splitlines(keepends=True)
    (made.folder / "few.jsonl").write_text("".join(lines[:24]))
    return made


@pytest.fixture(scope="session")
def first(world, tmp_path_factory):
    """A finished run of 9 steps, for reading only."""
    return train.run(settings(world, tmp_path_factory.mktemp("runs") / "first"))
