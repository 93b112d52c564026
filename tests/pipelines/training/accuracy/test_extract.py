"""Answers taken from texts, and when two are equal."""

import doctest

import pytest

from pipelines.training.accuracy import extract, measure
from pipelines.training.accuracy.extract import equal, rule_for


@pytest.mark.parametrize(
    "rule, text, want",
    [
        ("number", "so 3 + 4 = 7\n#### 1,234", "1234"),
        ("number", "#### -5.50 dollars, not 6", "-5.50"),
        ("number", "It is 7, or 8.", "8"),
        ("number", "#### none", None),
        ("number", "between 3-5", "5"),
        ("number", "on 2024-05-06", "06"),
        ("number", "5 - 8 = -3", "-3"),
        ("number", "x=-3", "-3"),
        ("number", "a loss of -$1,200.50", "-1200.50"),
        ("number", "the point 3,4", "4"),
        ("number", "12,34,567 rupees", "1234567"),
        ("number", "it is .5", ".5"),
        ("number", "", None),
        ("letter", "(B)", "B"),
        ("letter", "B. because A", "B"),
        ("letter", "**C**", "C"),
        ("letter", "First (A) fails, so the answer is (D).", "D"),
        ("letter", "Answer: e", None),
        ("letter", "A man walks", "A"),
        ("letter", "A man walks, so (C)", "C"),
        ("letter", "I would choose (B).", "B"),
        ("letter", "A because (B) is wrong", "A"),
        ("letter", "Because", None),
        ("line", "\n\n yes \nno", "yes"),
        ("line", " \n", None),
        ("last-line", "think\nThe answer is no.\n", "no."),
        ("whole", " a\nb ", "a\nb"),
        ("line", "<think>\n5 or 6?\n</think>\n\n6", "6"),
        ("line", "5 or 6?\n</think>6", "6"),  # the prompt has opened the reasoning
        ("number", "<think>\n5 or 6", None),  # the reasoning did not end
        ("letter", "[THINK](A)?[/THINK](B)", "B"),
        ("regex:\\d+", "<think>5</think>6", "6"),
        ("number", r"\boxed{42}, because 40 + 2 = 42 and not 43", "42"),
        ("number", r"\boxed{\dfrac{1}{2}} of 3", "1/2"),
        ("letter", r"(A) or \boxed{B}.", "B"),
        ("number", r"\boxed{x} is 3", "3"),
        ("number", r"unclosed \boxed{3", "3"),
        ("last-line", r"$\boxed{\text{yes}}$", "yes"),
        (r"regex:<(\w+)>", "x <one> <two>", "one"),
        (r"regex:\d+", "x 12", "12"),
        (r"regex:\d+", "x", None),
    ],
)
def test_rules(rule, text, want):
    assert extract.extract(rule, text) == want


@pytest.mark.parametrize(
    "answer, gold, same",
    [
        ("Yes.", "yes", True),
        ("ＹＥＳ", "yes", True),
        ("$1,000", "1000.0", True),
        ("1/2", "0.5", True),
        ("1/0", "0.5", False),
        ("1e3", "1000", True),
        ("nan", "NaN", True),
        ("inf", "-inf", False),
        ("12", "1.2", False),
        (".5", "5", False),
        ("1,2", "12", False),
        ("1,2", "1,2", True),
        ("1,234,567.5", "1234567.5", True),
        ("-$5", "-5", True),
        ("-$5", "5", False),
        ("yes", r"\text{Yes}", True),
        ("0.5", r"\tfrac{1}{2}", True),
        (None, "", False),
        ("...", "...", True),
        ("the cat", "cat", False),
    ],
)
def test_equality(answer, gold, same):
    assert equal(answer, gold) is same


@pytest.mark.parametrize(
    "gold, turn, want",
    [
        ("18", "9 + 9 = 18\n#### 18", ("number", True)),
        (r"\frac{1}{2}", r"It is \boxed{\frac{1}{2}}.", ("number", True)),
        ("yes", "<think>no?</think>yes", ("line", True)),
        ("(C)", "Let us see. So the answer is (C).", ("letter", True)),
        ("valid", "We start.\nSo the answer is valid.", ("last-line", True)),
        ("True", "True", ("line", True)),
        ("a\nb", "a\nb", ("whole", True)),
        ("7", "seven", ("number", False)),
        ("x", "nothing of the kind", ("line", False)),
    ],
)
def test_a_rule_must_find_the_gold_answer_in_the_row_s_own(gold, turn, want):
    assert rule_for(gold, turn) == want


@pytest.mark.parametrize("module", [extract, measure])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "text, want",
    [
        ("```python\na\n```\n```\nb\n```", "a\n\nb\n"),
        ("a = 1", "a = 1"),
        ("```py\nx", "x"),
        ("<think>```\na\n```</think>b = 1", "b = 1"),
    ],
)
def test_code_stands_in_fences_or_alone(text, want):
    assert measure.code_of(text) == want
