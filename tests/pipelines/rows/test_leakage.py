"""Held-out rows that were seen before, and the sentence about them."""

from pipelines.rows.dedup import overlaps
from pipelines.rows.leakage import sentence
from tests.pipelines.rows.test_dedup import LONG, chat, pool_of, scan_of

FOUND = [
    {"where": "pool", "rows": 3, "of": 60, "examples": ["test{0}.jsonl:3 is {pool}.jsonl:8"]},
    {"where": "selection", "rows": 1, "of": 60, "examples": ["test{0}.jsonl:3 is s.jsonl:1"]},
]


def test_the_sentence_names_rows_of_any_file():
    """Braces in a file's name are part of the name."""
    assert sentence(FOUND, "target rows") == (
        "3 of 60 target rows are also in the pool (test{0}.jsonl:3 is {pool}.jsonl:8); "
        "1 of 60 in the selection (test{0}.jsonl:3 is s.jsonl:1)"
    )
    assert sentence(FOUND[:1]).startswith("3 of 60 test rows are also in the pool (")


def told(tmp_path, test, pool):
    """Whether `overlaps` finds the test row in the pool."""
    one, other = pool_of(tmp_path, [test], "test.jsonl"), pool_of(tmp_path, [chat("q", "a"), pool], "pool.jsonl")
    return overlaps(one, scan_of(one), other, scan_of(other)) == {0: 1}


def system(text, row, *, role="system"):
    return {"messages": [{"role": role, "content": text}, *row["messages"]]}


def test_a_row_under_another_system_prompt_or_inside_a_conversation_was_seen(tmp_path):
    """The same question and answer were no leak as soon as a system prompt stood above them, or a turn after them."""
    short, long = chat("2 + 2?", "4"), chat("Describe the canal.", LONG)
    for row in (short, long):
        prompted, longer = (
            system("Be helpful.", row),
            {"messages": [*row["messages"], *chat("Thanks", "Sure")["messages"]]},
        )
        assert told(tmp_path, prompted, row) and told(tmp_path, row, prompted)
        assert told(tmp_path, row, longer) and told(tmp_path, row, system("Be helpful.", longer, role="developer"))
        assert not told(tmp_path, longer, row), "its last answer was not seen"
        reworded = {"messages": [row["messages"][0], {"role": "assistant", "content": "No."}]}
        assert not told(tmp_path, reworded, row)
    assert told(tmp_path, system("Be helpful.", long), system("You are Qwen.", long))
    yes = chat("The film was long.", "yes")
    assert not told(tmp_path, system("Is this praise?", yes), system("Is this about films?", yes)), "another question"
    assert told(tmp_path, chat("  2  +\t2? ", "4\n"), short)
    assert told(
        tmp_path, {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, short
    )
