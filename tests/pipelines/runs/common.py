"""What the tests of run folders share."""

import json
from pathlib import Path

from pipelines.settings.select import SelectConfig


def config(**more):
    values = {"model": "m", "train": "a.jsonl", "target": "d.jsonl"} | more
    return SelectConfig(**values)


def read(path):
    return json.loads(Path(path).read_text())
