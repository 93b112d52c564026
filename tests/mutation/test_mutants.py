"""What `python -m tests.mutation.run` changes, and how it counts; the run itself takes half an hour."""

import ast
from collections import Counter

import pytest

from tests.mutation import run
from tests.mutation.operators import OPERATORS, Mutant, mutants

SOURCE = '''"""A text with 1 in it."""


@decorated(2)
def f(x: "list[3]", k: int = 4, *, deep: bool = True) -> dict[str, 5]:
    """Another."""
    if x < k and not deep:
        raise ValueError(f"{x + 6} is too small")
    y = [max(v, 0.5) for v in x if v]
    y.append(-k)
    assert len(y) == 7
    x[0] = sorted(y, key=len)
    for a, b in zip(x, y, strict=True):
        if isinstance(a, int | float):
            continue
        k += a * b
    return k
'''


def changed(operator):
    return {m.apply(SOURCE)[m.start : m.start + len(m.text)] for m in mutants("f.py", SOURCE) if m.operator == operator}


def test_every_operator_makes_what_it_says():
    assert changed("comparison") == {"(x <= k)", "(x >= k)"}
    assert changed("constant") == {"5", "3", "False", "1", "1.0"}
    assert changed("arithmetic") == {"(a / b)", "k -= a * b"}
    assert changed("and/or") == {"(x < k or not deep)"}
    assert changed("negated condition") == {
        "(not (x < k and (not deep)))", "(not v)", "(not isinstance(a, int | float))",
    }  # fmt: skip
    assert changed("removed statement") == {"pass"}
    lines = Counter(m.line for m in mutants("f.py", SOURCE) if m.operator == "removed statement")
    assert sorted(lines) == [8, 10, 12, 15, 16], "the error, two calls and a place, the jump, the sum"
    assert changed("left-out keyword") == {"sorted(y)"}
    assert changed("partner") == {"min", "y.extend"}
    assert changed("sign") == {"(deep)", "(k)"}
    assert {m.operator for m in mutants("f.py", SOURCE)} == set(OPERATORS)


def test_texts_annotations_decorators_errors_and_assertions_stay():
    for mutant in mutants("f.py", SOURCE):
        text = mutant.apply(SOURCE)
        ast.parse(text)
        kept = ("A text with 1", "@decorated(2)", '"list[3]"', "dict[str, 5]", "assert len(y) == 7", "strict=True")
        assert all(part in text for part in kept), mutant
        assert "x + 6" in text or "raise" not in text


def test_columns_count_bytes_and_lines_are_told_without_indentation():
    source = 'def f(x):\n    return "ä" + str(x < 1)\n'
    comparison = next(m for m in mutants("f.py", source) if m.operator == "comparison")
    assert comparison.lines(source) == ('return "ä" + str(x < 1)', 'return "ä" + str((x <= 1))')


def of(file, kinds):
    return [Mutant(file, kind, i, i + 1, "x", i) for i, kind in enumerate(kinds)]


def test_a_sample_is_spread_over_modules_and_operators_and_repeats():
    found = {"a": of("a", ["c"] * 50 + ["k"] * 5), "b": of("b", ["c", "k"]), "c": of("c", ["k"] * 40)}
    drawn = run.sample(found, 30, 3)
    assert len(drawn) == 30 == len(set(drawn)) and drawn == run.sample(found, 30, 3) != run.sample(found, 30, 4)
    assert Counter(m.file for m in drawn) == {"a": 14, "b": 2, "c": 14}
    assert Counter(m.operator for m in drawn if m.file == "a") == {"c": 9, "k": 5}
    assert len(run.sample(found, 1000, 0)) == 97


def test_equivalent_mutants_are_told_by_their_lines():
    known = run.equivalents("a.py\n- x = 1\n+ x = 2\n# nothing reads it,\n# at all\n")
    assert known == {("a.py", "x = 1", "x = 2"): "nothing reads it, at all"}
    with pytest.raises(SystemExit, match="not an entry"):
        run.equivalents("a.py\n- x = 1\n+ x = 2")
    assert run.stale(known, {"a.py": "x = 1\n"}) == [] and run.stale(known, {"b.py": "x = 1\n"}) == []
    assert run.stale(known, {"a.py": "x = 3\n"}) == ["a.py: x = 1"]


def test_the_score_leaves_out_what_is_equivalent():
    (one, *_) = mutants("f.py", SOURCE)
    states = ["caught"] * 19 + ["survived"] + ["equivalent"] * 5
    text, score = run.report([run.Outcome(one, "x < k", "x <= k", state) for state in states])
    assert score == 0.95 and "19 of 20 caught: 95.0 %" in text and text.count("+ x <= k") == 1
    assert run.report([])[1] == 1.0


def test_the_modules_and_their_tests_are_there_and_no_entry_is_stale():
    sources = {file: (run.REPOSITORY / file).read_text(encoding="utf-8") for file in run.MODULES}
    assert all((run.REPOSITORY / name).exists() for names in run.MODULES.values() for name in names)
    assert set(run.ONLY) <= set(run.MODULES)
    assert run.stale(run.equivalents(), sources) == []
