"""Every test of run folders starts in an empty folder, and leaves no run open."""

import sys

import pytest

from pipelines.runs import current


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["datatools", "select"])
    current.opened(None)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield
    assert current.run() is None
