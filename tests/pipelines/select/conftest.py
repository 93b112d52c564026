"""The run that others are compared with, and how many rows were computed."""

import pytest

import pipelines.select.gradients
from pipelines.select import run as select


@pytest.fixture(scope="session")
def first(world, tmp_path_factory):
    """A selection with LESS, for reading only."""
    return select.run(world.select(tmp_path_factory.mktemp("runs") / "first"))


@pytest.fixture
def counted(monkeypatch):
    """How many rows' gradients are computed: a one-element list that counts."""
    inner, total = pipelines.select.gradients.extract, [0]

    def extract(*args, advance, **options):
        def count(rows, tokens):
            total[0] += rows
            advance(rows, tokens)

        return inner(*args, advance=count, **options)

    monkeypatch.setattr(pipelines.select.gradients, "extract", extract)
    return total
