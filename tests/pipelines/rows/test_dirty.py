"""The planted file of broken, odd, duplicate and hostile rows: what becomes of each line, under every policy."""

import json
from collections import Counter

import pytest

from datatools import DataError
from pipelines.rows.dedup import dedup
from pipelines.rows.encode import Encoder
from pipelines.rows.jsonl import Limits
from pipelines.rows.options import Options
from pipelines.rows.read import index_rows, read_pool

# what a label's `expect` allows: kept, duplicate (dropped as one), bad (dropped with a reason), blank (not a row)
ALLOWED = {
    "keep": {"kept"},
    "keep_or_flag": {"kept", "bad"},
    "drop": {"bad"},
    "drop_or_flag": {"bad", "flagged"},
    "drop_duplicate": {"duplicate"},
    "drop_near_duplicate_or_keep": {"duplicate", "kept"},
    "ignore": {"blank"},
    "skip_line_with_message": {"bad"},
    "skip_or_replace_with_message": {"bad"},
    "keep_or_skip_with_message": {"kept", "bad"},
    "truncate_or_drop": {"cut", "bad"},
    "truncate_or_keep": {"cut", "kept"},
    "truncate_or_flag": {"cut", "bad"},
    "keep_answer_after_truncation_or_drop": {"kept", "cut", "bad"},
    "keep_with_new_id_or_error": {"kept"},
    "keep_cast_id": {"kept"},
    "keep_as_unknown_source": {"kept"},
    "keep_normalise_or_flag": {"kept"},
    "keep_safe_file_names": {"kept"},
    "keep_escape_in_reports": {"kept"},
    "keep_escape_in_csv": {"kept"},
    "keep_loss_on_assistant_turns": {"kept"},
    "keep_one_row": {"kept"},
    "keep_or_trim": {"kept"},
    "keep_or_merge": {"kept", "flagged"},
    "strip_or_keep": {"kept", "flagged"},
    "escape_or_flag": {"bad"},
    "convert_or_drop": {"kept"},
    "cast_or_drop": {"kept", "bad"},
    "map_or_drop": {"kept"},
}
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def planted(shared):
    folder = shared / "data" / "planted"
    labels = json.loads((folder / "dirty_labels.json").read_text())["lines"]
    return folder / "dirty.jsonl", {label["line"]: label for label in labels}


@pytest.fixture(scope="module")
def tokenizer(shared):
    """The small model's, with ChatML's two tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260k")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def outcomes(path, tokenizer, tmp_path, max_length, on_long, **policy):
    """line -> what became of it; and the bad rows."""
    encoder = Encoder(tokenizer, max_length=max_length, on_long=on_long)
    options = Options("dataset", {}, False, None, Limits())
    indexed = index_rows([path], options, cache=tmp_path, encoder=encoder, **policy)
    pool, bad, result = indexed.pool, indexed.bad, indexed.scan
    keep, twins = dedup(pool, result, "near", 0.8)
    found = dict.fromkeys(range(1, path.read_bytes().count(b"\n") + 2), "blank")
    for i in range(len(pool)):
        odd = set(pool[i].flags) - {"parts_joined", "role_renamed"}
        found[pool.line(i)] = "cut" if result.cut[i] else "flagged" if odd else "kept"
        if not keep[i]:
            found[pool.line(i)] = "duplicate"
    for row in bad + result.bad:
        found[row.line] = "bad"
    return found, bad + result.bad, {pool.line(row): pool.line(twin) for row, twin in twins.items()}


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
@pytest.mark.parametrize(("max_length", "on_long"), [(2048, "truncate"), (2048, "skip"), (100_000, "truncate")])
def test_every_line_is_handled_as_its_label_allows(planted, tokenizer, tmp_path, policy, max_length, on_long):
    path, labels = planted
    found, bad, twins = outcomes(
        path, tokenizer, tmp_path, max_length, on_long, on_bad_row=policy, quarantine=tmp_path / "quarantine.jsonl"
    )
    assert set(found) == set(labels)
    wrong = []
    pairs = set(twins) | set(twins.values())
    for line, label in labels.items():
        allowed = set(ALLOWED[label["expect"]])
        if "kept" in allowed:
            allowed.add("flagged")
        if "cut" in allowed:
            allowed |= {"kept"} if max_length > 10_000 else {"bad"}  # nothing is long, or long rows are refused
        if line in pairs:  # of two copies either may go: the one with the larger key does
            allowed |= {"kept", "duplicate"}
        if found[line] not in allowed:
            wrong.append((line, label["problems"], label["expect"], found[line]))
    assert not wrong
    lines = path.read_bytes().split(b"\n")
    for row in bad:
        assert row.reason.isidentifier() and row.detail.isprintable() and row.file == str(path)
        offset = sum(len(text) + 1 for text in lines[: row.line - 1])
        assert row.byte_offset == offset + (3 if row.line == 1 else 0)
    if policy == "quarantine":
        unread = sorted(row.line for row in bad if row.reason not in _ENCODING)
        assert (tmp_path / "quarantine.jsonl").read_bytes() == b"".join(lines[line - 1] + b"\n" for line in unread)


_ENCODING = {"too_long", "no_supervised_token", "control_token_in_text", "template_refuses", "template_changes_text"}


def test_counts(planted, tokenizer, tmp_path):
    """150 lines: 148 rows, of which 31 are bad (27 as read, 4 as encoded), and 16 repeat others."""
    path, labels = planted
    found, bad, twins = outcomes(path, tokenizer, tmp_path, 2048, "truncate", on_bad_row="skip")
    planted_copies = sum(
        "duplicate_row" in str(label["problems"])
        or "duplicate_text" in str(label["problems"])
        or "near_duplicate" in str(label["problems"])
        for label in labels.values()
    )
    counts = Counter(found.values())
    assert counts["blank"] == 2 and counts["duplicate"] == len(twins) == planted_copies == 16
    assert counts["bad"] == len(bad) == 31
    assert counts["cut"] == 4 and sum(counts.values()) == 150


def test_error_policy_names_lines_and_the_way_on(planted, tmp_path):
    path, labels = planted
    with pytest.raises(DataError) as caught:
        read_pool([path], cache=tmp_path)
    message = str(caught.value)
    assert f"{path}:7: unknown_role" in message and "--on-bad-row skip" in message and message.isprintable()
    ours = {label["line"] for label in labels.values() if "duplicate_id" in str(label["problems"])}
    assert "5 repeated_id" in message and ours == {18, 100}  # and three whole rows that are there twice
