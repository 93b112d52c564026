"""The examples that write a page, on a small scale: they run, and the page has what they found."""

import html
import re
from importlib import import_module

import pytest
import torch

from datatools import per_sample_grads
from tests.conftest import REPOSITORY


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    with torch.random.fork_rng():
        yield import_module


def check(path, headings):
    """The page has these headings in this order, charts without a number that is none, and a picture."""
    text = path.read_text(encoding="utf-8")
    assert [html.unescape(one) for one in re.findall("<h2>(.*?)</h2>", text)] == headings
    assert "<svg" in text and "data:image/png" in text and not re.search(r"\bnan\b|\binf\b", text)


def test_digits(example, tmp_path, capsys):
    digits = example("digits")
    digits.main(tmp_path / "digits.html", seeds=1, steps=4, count=3, trials=2)
    check(tmp_path / "digits.html", ["Which rows", "Which rows of a batch", "In which order"])
    share = re.search(r"wrong labels: ([\d.]+) per cent of the 600 selected rows, ([\d.]+)", capsys.readouterr().out)
    assert float(share[1]) < 15 < 25 < float(share[2])  # a third of the pool's labels are wrong


@pytest.mark.slow
def test_spine(example, tmp_path, capsys, monkeypatch):
    spine = example("spine")
    monkeypatch.setattr(spine, "WIDTH", 1)
    monkeypatch.setattr(spine, "LEVELS", 1)
    spine.main(tmp_path / "spine.html", volumes=8, steps=1, seeds=1, batches=2, trials=2)
    check(tmp_path / "spine.html", [
        "A volume of the target scanner", "Segmentation and localization", "Which volumes are wrong",
        "Which volumes help another scanner", "In which order",
    ])  # fmt: skip
    assert "centres" in capsys.readouterr().out


def test_gradients_of_a_volume_are_those_of_the_volume_alone(example):
    spine = example("spine")
    module, rows = spine.IVDNet(1, 2).eval(), spine.phantoms(2, 0, wrong=0.5)
    names = [name for name, _ in module.named_parameters()]
    got = per_sample_grads(spine.losses, module, rows, names)
    want = per_sample_grads(spine.losses, module, rows, names, method="loop")
    scale = max(float(grad.abs().max()) for grad in want.values())
    for name in names:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4 * scale)


def test_a_perfect_segmentation_has_dice_one_and_centres_in_place(example):
    spine = example("spine")
    rows = spine.phantoms(2, 0)

    assert spine.measured(lambda image: rows["mask"] - 0.5, rows) == ([1.0] * spine.DISCS, 0.0)
    assert spine.area(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, False, False])) == 1.0


def test_approximation(example, tmp_path, capsys):
    approximation = example("approximation")
    approximation.main(tmp_path / "a.html", steps=3, widths=(2, 4), heads=(1, 2), names=("sgd", "muon", "sophia_g"))
    check(tmp_path / "a.html", ["By width and heads", "By optimizer", "What was learned"])
    assert "sophia_g is not here: it samples labels" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "muon: " in capsys.readouterr().out


def test_every_example_has_a_row_in_the_table():
    table = (REPOSITORY / "examples/README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (REPOSITORY / "examples").glob("*.py")} - {"tiny.py", "page.py"}
    assert scripts <= set(re.findall(r"`(\w+\.py)`", table))
