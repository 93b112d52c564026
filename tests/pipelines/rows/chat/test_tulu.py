"""The format of LESS, and the mask that it published."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datatools import DataError
from pipelines.rows.chat.refusals import RowError
from pipelines.rows.encode import Encoder
from pipelines.rows.encoded import IGNORED
from pipelines.rows.read import read_pool
from tests.pipelines.rows.families import FAMILIES, byte_fallback, byte_level, conversations, row, trained


def test_tulu_is_the_format_of_less():
    tokenizer = byte_fallback((), "<s>", "</s>")
    encode = Encoder(tokenizer, chat="tulu", max_length=1000)
    turns = row(("system", " s "), ("user", "q\n"), ("assistant", " the a "), ("user", "r"), ("assistant", "b"))
    encoded = encode(turns)
    assert tokenizer.decode(encoded.input_ids) == (
        "<s> <|system|>\ns\n<|user|>\nq\n<|assistant|>\nthe a</s> \n<|user|>\nr\n<|assistant|>\nb</s> \n"
    )
    assert trained(tokenizer, encoded) == ["the a</s> \n", "b</s> \n"]
    assert encoded.labels[0] == IGNORED
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Encoder(byte_level(), chat="tulu", max_length=100)(turns)


def less_labels(tokenizer, messages, max_length: int) -> list[int]:
    """The published mask, by tokenising every prefix again (spec/less.md section 3)."""

    def text(turns):
        return "".join(
            f"<|{t['role']}|>\n{t['content'].strip()}{tokenizer.eos_token if t['role'] == 'assistant' else ''}\n"
            for t in turns
        )

    def length(prefix):
        return len(tokenizer(prefix, truncation=True, max_length=max_length)["input_ids"])

    labels = tokenizer(text(messages), truncation=True, max_length=max_length)["input_ids"]
    for k, turn in enumerate(messages):
        if turn["role"] != "assistant":
            start = length(text(messages[:k])) if k else 0
            header = k + 1 < len(messages) and messages[k + 1]["role"] == "assistant"
            end = length(text(messages[: k + 1]) + "<|assistant|>\n" * header)
            labels[start:end] = [IGNORED] * len(labels[start:end])
    return labels


@given(turns=conversations(FAMILIES["zephyr"]), max_length=st.sampled_from([40, 1000]))
def test_tulu_equals_the_published_mask(turns, max_length):
    """Offsets and prefix lengths agree on a tokenizer that merges nothing across a newline."""
    tokenizer = byte_fallback((), "<s>", "</s>")
    assume(not any("s>" in text or "<unk>" in text for _, text in turns))
    messages = row(*turns)
    expected = less_labels(tokenizer, messages.messages, max_length)
    try:
        assert Encoder(tokenizer, chat="tulu", max_length=max_length)(messages).labels == expected
    except RowError as error:
        assert error.reason == "no_supervised_token" and set(expected[1:]) == {IGNORED}


@pytest.mark.golden
@pytest.mark.parametrize("part", ["train", "val"])
def test_tulu_equals_golden(golden_dir, shared, tmp_path, part, record_property):
    """Token ids and labels that LESS's own encoding function gave, byte for byte."""
    from transformers import AutoTokenizer

    record_property("golden", f"less encoding, {part}")
    cases = sorted((golden_dir / "less").glob("*/manifest.json"))
    if not cases:
        pytest.skip(f"no case in {golden_dir / 'less'}")
    for case in cases:
        manifest = json.loads(case.read_text())
        tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260k")
        encode = Encoder(tokenizer, chat=manifest["chat_format"], max_length=manifest["max_length"])
        pool, _ = read_pool([case.parent / f"{part}.jsonl"], cache=tmp_path)
        with np.load(case.parent / "expected.npz") as expected:
            offsets, ids = expected[f"{part}_offsets"], expected[f"{part}_input_ids"]
            labels = expected[f"{part}_labels"]
        assert len(pool) == len(offsets) - 1
        for k, example in enumerate(pool):
            encoded = encode(example)
            span = slice(offsets[k], offsets[k + 1])
            np.testing.assert_array_equal(encoded.input_ids, ids[span], err_msg=example.id)
            np.testing.assert_array_equal(encoded.labels, labels[span], err_msg=example.id)
