"""A world with sources of different sizes, and a finished run."""

import json

import pytest

from pipelines.training import train
from tests.pipelines.colm.runs import settings
from tests.pipelines.conftest import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A world whose `mixed.jsonl` has 40 rows: 20 of big, 16 of large, 4 of rare."""
    made = make_world(tmp_path_factory.mktemp("world"))
    lines = [json.loads(line) for line in made.pool.read_text().splitlines()[:40]]
    for i, row in enumerate(lines):
        row["dataset"] = "rare" if i % 10 == 3 else "big" if i % 2 else "large"
    lines[0]["dataset"] = "big"
    (made.folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return made


@pytest.fixture(scope="session")
def first(world, tmp_path_factory):
    """A finished run of ten steps, for reading only."""
    return train.run(settings(world, tmp_path_factory.mktemp("runs") / "first"))
