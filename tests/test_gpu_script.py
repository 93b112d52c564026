"""The dry form of `make gpu`: every kernel agrees in the interpreter, and the file says what was done."""

import json
from importlib.util import find_spec

import pytest

from optim import backend
from tests import gpu


@pytest.mark.skipif(not backend.interpreted, reason="triton is not installed, or kernels are made for a GPU")
def test_the_dry_form_compares_every_kernel(tmp_path, capsys):
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    body = json.loads((tmp_path / "gpu-interpreter.json").read_text())
    assert body["tests"] is None and len(body["kernels"]) == 10
    assert all(entry["agrees"] and entry["apart"] <= entry["allowed"] for entry in body["kernels"])


def test_what_does_not_fit_is_named(tmp_path, capsys):
    if backend.interpreted:
        assert gpu.main(["--dry", "--out", str(tmp_path), "--limit", "-1"]) == 0
        assert capsys.readouterr().out.count("no time was left") == 10
    if not gpu.torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path)]) == 2 and "--dry" in capsys.readouterr().err


@pytest.mark.skipif(not backend.interpreted, reason="triton is not installed, or kernels are made for a GPU")
def test_an_error_half_way_is_written_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda *_: [][0])
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    assert "IndexError" in (tmp_path / "gpu-interpreter.json").read_text()


def test_tests_of_kernels_are_not_skipped_for_nothing():
    """They were, when `import optim` no longer loaded what reads the environment."""
    assert backend.interpreted or find_spec("triton") is None or gpu.torch.cuda.is_available()
