"""The tokens of a pool: every row is encoded once, and its tokens are kept on disk for all stages of a run.

The file has one record per row (ids as int32, then one byte per token for whether it has loss), followed by an index
with the results of encoding. It gets its name only when it is complete. It is used again for the same rows, if they
are read in the same way and encoded by the same code with the same tokenizer, template and limits. The index has a
digest, and every record is compared with the content key of its row. Damaged or missing records are encoded again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import struct
from collections import Counter
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from datatools import files
from pipelines.rows.encode import Encoder
from pipelines.rows.encoded import IGNORED, Encoded
from pipelines.rows.index import Pool
from pipelines.rows.scan import Progress, Scan, scan

_MAGIC = b"DTTOKEN1"
_FOOTER = struct.Struct("<QQ16s8s")  # bytes of the arrays and of the facts, their digest, magic
_ARRAYS = (("ok", "<u1"), ("tokens", "<i4"), ("supervised", "<i4"), ("cut", "<i4"))
_KEY_BYTES = 16
_ONE_RUN = {"template_too_slow", "template_too_large"}
"""Reasons that depend on the machine: such tokens are kept for this run only, and the next run encodes again."""


class Tokens:
    """The kept tokens of a pool. Memory does not depend on the number of rows.

    Args:
        path: The file.
        index_at: The offset of its index of records.
        scan: The result of encoding the pool.
    """

    def __init__(self, path: Path, index_at: int, scan: Scan) -> None:
        self._path = path
        self._index_at = index_at
        self._scan = scan

    def row(self, index: int) -> Encoded | None:
        """Return the tokens of a row; None if they are missing or damaged.

        Args:
            index: The number of the row.
        """
        if not self._scan.ok[index]:
            return None
        try:
            with open(self._path, "rb", buffering=0) as file:
                (start,) = struct.unpack("<q", os.pread(file.fileno(), 8, self._index_at + 8 * index))
                n = int(self._scan.tokens[index])
                found = os.pread(file.fileno(), 5 * n, start)
        except (OSError, struct.error, OverflowError):
            return None
        if len(found) != 5 * n:
            return None
        ids = np.frombuffer(found, "<i4", n)
        labels = np.where(np.frombuffer(found, "<u1", n, 4 * n) != 0, ids, IGNORED)
        row = Encoded(ids.tolist(), labels.tolist(), int(self._scan.cut[index]))
        return row if row.key == self._scan.keys[index] else None


def encode_pool(
    pool: Pool, encoder: Encoder, folder: Path, label: str, progress: Progress | None = None
) -> tuple[Scan, Tokens]:
    """Encode every row of a pool, or read the tokens that an earlier command kept of the same encoding.

    Args:
        pool: The rows.
        encoder: How they are encoded.
        folder: The folder of the file of tokens.
        label: The name of the rows; there is one file per label and folder.
        progress: Advanced by one per row.

    Returns:
        The result of encoding, and the tokens.

    Raises:
        DataError: As in `Encoder`, or the file cannot be written.
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", label)
    key = _key(pool, encoder)
    path = Path(folder) / f"tokens-{slug}-{key[:16]}.bin"
    if (found := _read(path, key, pool)) is not None:
        if progress is not None:
            progress.advance(len(pool))
        return found
    files.make_folder(Path(folder))
    with files.atomic_path(path, durable=False) as temporary, open(temporary, "wb") as file:
        offsets = np.zeros(len(pool), "<i8")

        def keep(index: int, encoded: Encoded) -> None:
            offsets[index] = file.tell()
            labels = np.asarray(encoded.labels, "<i4")
            file.write(np.asarray(encoded.input_ids, "<i4").tobytes() + (labels != IGNORED).astype("<u1").tobytes())

        scanned = scan(pool, encoder, progress, keep)
        at = file.tell()
        _write_index(file, scanned, offsets, key)
    for other in Path(folder).glob(f"tokens-{slug}-*.bin"):
        if other != path and re.fullmatch(rf"tokens-{slug}-[0-9a-f]{{16}}\.bin", other.name):
            files.remove(other)
    return scanned, Tokens(path, at, scanned)


def _write_index(file: BinaryIO, scanned: Scan, offsets: NDArray[np.int64], key: str) -> None:
    if any(row.reason in _ONE_RUN for row in scanned.bad):
        key = ""
    keys = b"".join(bytes.fromhex(key) if key else bytes(_KEY_BYTES) for key in scanned.keys)
    arrays = offsets.tobytes() + b"".join(getattr(scanned, name).astype(kind).tobytes() for name, kind in _ARRAYS)
    arrays += keys
    bad = [[row.reason, row.detail] for row in scanned.bad]
    facts = json.dumps({"key": key, "bad": bad, "flags": dict(scanned.flags)}).encode()
    digest = xxhash.xxh3_128_digest(arrays + facts)
    file.write(arrays + facts + _FOOTER.pack(len(arrays), len(facts), digest, _MAGIC))


def _read(path: Path, key: str, pool: Pool) -> tuple[Scan, Tokens] | None:
    """Return the index of a file of tokens; None if it is missing, damaged, or of another encoding."""
    n = len(pool)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FOOTER.size))
            n_arrays, n_facts, digest, magic = _FOOTER.unpack(file.read())
            at = size - _FOOTER.size - n_facts - n_arrays
            wanted = n * (8 + sum(np.dtype(kind).itemsize for _, kind in _ARRAYS) + _KEY_BYTES)
            if magic != _MAGIC or at < 0 or n_arrays != wanted:
                return None
            file.seek(at)
            index = file.read(n_arrays + n_facts)
    except (OSError, struct.error):
        return None
    if xxhash.xxh3_128_digest(index) != digest:
        return None
    facts = json.loads(index[n_arrays:])
    if facts["key"] != key:
        return None
    arrays, start = {}, 8 * n
    for name, kind in _ARRAYS:
        arrays[name] = np.frombuffer(index, kind, n, start)
        start += arrays[name].nbytes
    ok = arrays["ok"].astype(bool)
    raw = index[start:n_arrays]
    keys = [raw[_KEY_BYTES * i : _KEY_BYTES * (i + 1)].hex() if ok[i] else "" for i in range(n)]
    unencoded = np.flatnonzero(~ok).tolist()
    bad = [pool.bad_row(i, reason, detail) for i, (reason, detail) in zip(unencoded, facts["bad"], strict=True)]
    tokens, supervised, cut = (arrays[name].astype(np.int32) for name in ("tokens", "supervised", "cut"))
    scanned = Scan(ok, tokens, supervised, cut, keys, bad, Counter(facts["flags"]))
    return scanned, Tokens(path, at, scanned)


def _key(pool: Pool, encoder: Encoder) -> str:
    """Return the xxh3-128 of all facts on which the tokens of the pool depend."""
    return files.digest(json.dumps([pool.identity(), encoder.identity(), _code()], sort_keys=True).encode())


@cache
def _code() -> dict[str, str]:
    """Return the code that encodes rows: digests of the files of this room, and versions of the packages it calls."""
    room = Path(__file__).parent
    found = {path.relative_to(room).as_posix(): files.digest_file(path) for path in sorted(room.rglob("*.py"))}
    return found | {name: importlib.metadata.version(name) for name in ("jinja2", "tokenizers", "transformers")}
