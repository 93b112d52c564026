"""Progress: lines, bars, progress.json, and silence."""

import io
import sys

import pytest

from pipelines.runs import messages
from pipelines.runs.folder import Run
from pipelines.runs.progress import Progress, progress
from tests.pipelines.runs.common import config, read


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_lines_every_thirty_seconds(capsys):
    clock = Clock()
    bar = Progress("gradients", 1000, "rows", 100, clock=clock)
    for _ in range(9):
        clock.now += 10
        bar.advance(20, loss=1.23456, tokens=900)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "gradients: 160 of 1,000 rows (16 %), 2 rows/s, loss 1.235, tokens 900, about 7 min left"
    assert bar.rate == 2 and bar.eta_seconds == 360


def test_quiet_means_quiet(capsys):
    with messages.quietly():
        with progress("x", 3) as bar:
            bar.advance(3)
        messages.say("hello")
        assert capsys.readouterr().err == ""
        messages.warn("still said")
        assert capsys.readouterr().err == "warning: still said\n"
    messages.say("hello")
    assert capsys.readouterr().err == "hello\n"


def test_progress_json_is_fresh():
    with Run("r", config(), "select"), progress("gradients", 4, "rows") as bar:
        bar.advance(1, loss=2.0)
        found = read("r/progress.json")
        assert found["state"] == "running" and found["doing"]["description"] == "gradients"
        assert found["doing"]["done"] == 1 and found["doing"]["total"] == 4 and found["doing"]["notes"] == {"loss": 2.0}


def test_data_cannot_command_the_terminal(capsys):
    messages.say("\x1b[31mred\u202egnp.exe\r")
    with progress("a\x1b[2J", None) as bar:
        bar.advance(1, source="x\x07")
    text = capsys.readouterr().err
    assert not set(text) & {"\x1b", "\u202e", "\r", "\x07"} and "red" in text


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("outer", 2, "files") as outer, progress("inner [bold]", 5) as inner:
        inner.advance(5, loss=0.5)
        messages.say("news [red]")
        outer.advance()
    text = screen.getvalue()
    assert "inner [bold]" in text and "news [red]" in text and messages._bars.get() is None
    with pytest.raises(ZeroDivisionError), progress("broken", 2):
        raise ZeroDivisionError
    assert messages._bars.get() is None
