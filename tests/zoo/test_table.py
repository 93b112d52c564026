"""The table of the zoo holds what is computed anew; here for a stride of the classes, by `make zoo` for all of them."""

import pytest
import transformers

from tests.zoo import build, table

EVERY = table.every()
KINDS = ("right", "refused", "wrong", "crash")


def test_the_table_is_of_the_zoo_and_of_this_transformers():
    whole = table.read()
    assert whole["transformers"] == transformers.__version__, f"made with another version: {table.REGENERATE}"
    assert sorted(whole["classes"]) == EVERY, f"classes came or went: {table.REGENERATE}"
    assert set(whole["not in the zoo"]) == set(build.UNBUILDABLE)


def test_the_table_promises_what_the_toolkit_promises():
    """No number is wrong and nothing crashes; 95 of 100 classes are right, with 9 of 10 matrix numbers covered."""
    classes = table.read()["classes"]
    verdicts = {(name, key): table.verdict(cell) for name, cells in classes.items() for key, cell in cells.items()}
    bad = [(where, kind) for where, (kind, _) in verdicts.items() if kind in ("wrong", "crash")]
    assert not bad
    for key in ("gradients", "lora", "values", "groups", "features", "coreset", "order", "training"):
        right = [verdicts[name, key] for name in classes if verdicts[name, key][0] == "right"]
        assert len(right) >= 0.95 * len(classes), key
        assert all(share is None or share >= 0.9 for _, share in right), key
    refusals = [cell for cells in classes.values() for cell in cells.values() if cell.startswith("refused")]
    assert all("Error: " in cell for cell in refusals)


@pytest.mark.parametrize("name", EVERY[::12])
def test_a_class_gives_what_the_table_says(name):
    assert table.differences(name, table.entry(name), table.read()["classes"].get(name)) == []


def test_improvements_and_regressions_both_show():
    was = {"gradients": "right 0.95", "lora": "wrong: dt_proj: relative error 1.0", "order": "right"}
    assert table.differences("Any", was | {"lora": "wrong: another note"}, was) == []
    for cells in ({"lora": "right 1"}, {"gradients": "right 0.97"}, {"gradients": "right 0.5"}, {"order": "crash: x"}):
        (line,) = table.differences("Any", was | cells, was)
        assert line.startswith("Any, ") and "the table says" in line
    assert table.differences("New", was, None) == ["New: not in the table"]


def test_a_summary_counts_classes_by_their_worst_check():
    found = {"A": {"gradients": "right 1", "order": "right"}, "B": {"gradients": "wrong: x", "order": "refused: y"}}
    last = table.summary(found).splitlines()
    assert "all                 1        0        1        0   of 2 classes" in last
