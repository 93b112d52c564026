"""Numbers in words, ticks of axes, and characters that would hide or reorder text."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import texts
from pipelines.report import charts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve, 数, 😀", "plain, naïve, 数, 😀"),
        ("a\u202eb", "a<U+202E>b"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("\x00\x7f\x9b", "<U+0000><U+007F><U+009B>"),
        ("a\nb\tc\r", "a<U+000A>b<U+0009>c<U+000D>"),
        ("\u2028\u2029\ufeff\u00ad\u200b", "<U+2028><U+2029><U+FEFF><U+00AD><U+200B>"),
        ("\ud800", "<U+D800>"),
        ("\U000e0041", "<U+E0041>"),
        ("👩\u200d👧", "👩\u200d👧"),  # a joiner that shapes a picture
        ("می\u200cخواهم", "می\u200cخواهم"),  # and one that Persian spelling needs
        ("pass\u200dword", "pass<U+200D>word"),  # but not one hidden in a word
        ("\u200d", "<U+200D>"),
        ("\u0600١", "\u0600١"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert texts.visible(text) == shown


def test_visible_keeps_what_it_is_told_to() -> None:
    assert texts.visible("a\n\tb\r", "\n\t") == "a\n\tb<U+000D>"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_visible_hides_nothing_and_is_stable(text: str) -> None:
    shown = texts.visible(text)
    assert texts.visible(shown) == shown
    shown.encode("utf-8")
    markup = str(texts.marked(text))
    assert not {"<script", "\x1b"} & {markup, *markup}
    assert re.sub(r'<span class="u">|</span>', "", markup).count("<") == 0


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (texts.number, 0.0616, "0.0616"),
        (texts.number, -0.04161, "−0.0416"),
        (texts.number, 0.0, "0"),
        (texts.number, 1234.5, "1,234"),
        (texts.number, 1.69e-5, "1.69e−5"),
        (texts.number, 4e-4, "0.000400"),
        (texts.number, 2.6e-7, "2.60e−7"),
        (texts.number, float("nan"), "–"),
        (texts.number, None, "–"),
        (texts.number, 0.09999, "0.100"),
        (texts.percent, 0.05, "5.0 %"),
        (texts.percent, 0.0, "0 %"),
        (texts.percent, 0.0001, "< 0.1 %"),
        (texts.percent, 1.0, "100 %"),
        (texts.percent, 0.9999, "100.0 %"),
        (texts.duration, 0.0, "0.0 s"),
        (texts.duration, 9.2, "9.2 s"),
        (texts.duration, 59.6, "1 min"),
        (texts.duration, 813.4, "13 min 33 s"),
        (texts.duration, 11520.0, "3 h 12 min"),
        (texts.duration, 190800.0, "2 d 5 h"),
        (texts.size, 512, "512 B"),
        (texts.size, 38_211_904, "38.2 MB"),
        (texts.size, 999_999, "1.0 MB"),
        (texts.size, 17.74e9, "17.7 GB"),
        (texts.signed, 0.05, "+0.0500"),
        (texts.signed, -0.00571, "−0.0057"),
    ],
)
def test_numbers_in_words(function: Any, value: float | None, text: str) -> None:
    assert function(value).replace("\u00a0", " ") == text


def test_ticks_are_round_and_inside() -> None:
    scale = charts.Scale(-0.0371, 0.1093)
    assert [tick.text for tick in charts.ticks(scale, 8)] == ["−0.02", "0.00", "0.02", "0.04", "0.06", "0.08", "0.10"]
    assert [tick.text for tick in charts.ticks(charts.Scale(0, 1000), 4)] == ["0", "500", "1,000"]
    assert len(charts.ticks(charts.Scale(2.0, 2.0))) == 1


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_of_any_range(low: float, span: float) -> None:
    found = charts.ticks(charts.Scale(low, low + span), 6)
    assert len(found) <= 16
    assert all(0 <= float(tick.at.rstrip("%")) <= 100 for tick in found)
