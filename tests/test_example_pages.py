"""The examples that write a page, on a small scale: they run, and the page has what they found."""

import html
import re
from importlib import import_module

import pytest
import torch

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


def test_every_example_has_a_row_in_the_table():
    table = (REPOSITORY / "examples/README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (REPOSITORY / "examples").glob("*.py")} - {"tiny.py", "page.py"}
    assert scripts <= set(re.findall(r"`(\w+\.py)`", table))
