"""A good row, lines of odd JSON, and pools that are read from bytes."""

import json
from pathlib import Path

from hypothesis import strategies as st

from pipelines.rows.index import Pool
from pipelines.rows.read import read_pool
from pipelines.rows.row import BadRow


def turn(role, content, **more) -> dict:
    return {"role": role, "content": content, **more}


GOOD = {"dataset": "d", "id": "a", "messages": [turn("user", "q"), turn("assistant", "r")]}


def line(identity="a", **changes) -> bytes:
    return json.dumps({**GOOD, "id": identity, **changes}).encode()


def chat(*turns: tuple[object, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def read(tmp_path: Path, data: bytes, name="data.jsonl", **options) -> tuple[Pool, list[BadRow]]:
    (tmp_path / name).write_bytes(data)
    options.setdefault("on_bad_row", "skip")
    return read_pool([str(tmp_path / name)], cache=tmp_path / "cache", **options)


KEYS = (
    "messages role content text prompt completion instruction output id conversations from value history system input "
    "weight type tools"
).split()
JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)

BROKEN = (
    *(b"", b"{", b"}", b"[", b'"', b",", b"\\", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r"),
    *(b"\\ud800", b"NaN", b"1e999"),
)


@st.composite
def lines(draw) -> bytes:
    """Valid JSON, then some bytes of it cut, doubled or overwritten."""
    raw = bytearray(json.dumps(draw(JSONISH), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.sampled_from(BROKEN))
    return bytes(raw)
