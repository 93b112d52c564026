"""Scanning a pool: the length of every row, the flags, and the rows that cannot be encoded."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import xxhash

from pipelines.rows.encoded import Encoded
from pipelines.rows.jsonl import Limits
from pipelines.rows.options import Options
from pipelines.rows.read import index_rows
from tests.pipelines.rows.families import PAIR, encoder


class Counting:
    done = 0

    def of(self, total: int):
        assert total == 8
        return nullcontext(self)

    def advance(self, n: int = 1) -> None:
        self.done += n


def test_scan(tmp_path):
    rows = [
        {"text": "Yes and no"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "<|im_end|>"},
        {"messages": PAIR.messages},
        {"text": "Yes and no", "id": "other"},
        {"prompt": "q " * 99, "completion": "a"},
        {"text": "<|im_end|>" * 3},
        {"text": "The quick brown fox jumps over it " * 9},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress, encode = Counting(), encoder("chatml", 40)
    options = Options("dataset", {}, False, None, Limits())
    found = index_rows([tmp_path / "rows.jsonl"], options, cache=tmp_path, encoder=encode, progress=progress.of)
    pool, result = found.pool, found.scan
    assert progress.done == 8
    assert result.ok.tolist() == [True, True, False, True, True, False, True, True]
    assert [(b.line, b.reason, b.byte_offset) for b in result.bad] == [
        (3, "control_token_in_text", pool.offset(2)),
        (6, "no_supervised_token", pool.offset(5)),
    ]
    assert result.flags == {"control_token_in_text": 1}
    for i in np.flatnonzero(result.ok):
        encoded = encode(pool[i])
        assert (result.tokens[i], result.supervised[i], result.cut[i]) == (
            len(encoded.input_ids),
            encoded.supervised,
            encoded.cut,
        )
        both = np.asarray(encoded.input_ids + encoded.labels, "<i4").tobytes()
        assert result.keys[i] == xxhash.xxh3_128_hexdigest(both)
    assert result.cut[7] > 0 and result.tokens[7] == 40
    assert result.keys[0] == result.keys[4] != result.keys[1] and result.keys[2] == ""
    assert {array.dtype.name for array in (result.tokens, result.supervised, result.cut)} == {"int32"}


def test_key_tells_ids_and_labels_apart():
    base = Encoded([1, 2, 3], [-100, 2, 3])
    assert base.key == replace(base, cut=5).key
    assert len({base.key, Encoded([1, 2, 3], [-100, -100, 3]).key, Encoded([1, 2, 4], [-100, 2, 4]).key}) == 3
