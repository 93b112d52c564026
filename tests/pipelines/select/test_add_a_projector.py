"""A projector is one file and one line in a table: a plugin written here is listed, checked, used and recorded."""

import json
from importlib import import_module

import pytest
import torch

from datatools import PROJECTORS, GradientFeatures
from pipelines.cli.app import main

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from datatools import Projector


@dataclass(frozen=True)
class Rotations(Projector):
    """Every coordinate goes to one feature, in turn."""

    name: ClassVar[str] = "rotations"

    def accumulate(self, out: Tensor, name: str, grad: Tensor) -> None:
        flat = grad.reshape(len(grad), -1).float()
        out.index_add_(1, torch.arange(flat.shape[1]) % self.dim, flat)
'''


@pytest.fixture
def rotations(tmp_path, monkeypatch):
    """The projector from a file of its own, and the one line in the table."""
    (tmp_path / "rotations_projector.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = import_module("rotations_projector").Rotations
    monkeypatch.setitem(PROJECTORS, found.name, found)
    return found


def test_a_new_projector_selects_from_the_command_line(rotations, world, tmp_path, capsys):
    assert main(["ls", "projectors"]) == 0 and "in turn" in capsys.readouterr().out
    assert main(world.argv("select", "--method", "less", "--projector", "rotation", out=tmp_path / "x")) != 0
    assert "did you mean 'rotations'" in capsys.readouterr().err
    out = tmp_path / "run"
    assert main(world.argv("select", "--method", "less", "--projector", "rotations", out=out)) == 0
    assert len((out / "selected.jsonl").read_text().splitlines()) == 6
    store = GradientFeatures.open(next((out / "features").glob("train-*")))
    assert store.meta["projector"]["name"] == "rotations" and store.dim == 256
    length = torch.linalg.vector_norm(store.take(store.unit_keys(0)), dim=1)
    torch.testing.assert_close(length, torch.ones_like(length))
    assert json.loads((out / "summary.json").read_text())
