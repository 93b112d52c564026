"""The sentence about held-out rows that were seen before."""

from pipelines.rows.leakage import sentence

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
