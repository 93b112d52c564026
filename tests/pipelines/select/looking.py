"""What selections wrote, read back."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from datatools import files


def hashes(folder):
    """Relative path -> hash of every file below `folder`."""
    return {str(p.relative_to(folder)): files.digest_file(p) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def outcome(run):
    """What must not depend on luck: the selection, the scores, and every byte of the feature stores."""
    return {
        "selected": (run / "selected.jsonl").read_bytes(),
        "scores": files.digest_file(run / "scores.parquet"),
        "table": files.digest_file(run / "selected.parquet"),
        **hashes(run / "features"),
    }


def scores(run):
    return pq.read_table(run / "scores.parquet").to_pydict()


def rows_in(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def ids(run):
    return [row["id"] for row in rows_in(run / "selected.jsonl")]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
