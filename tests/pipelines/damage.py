"""Values of another type in the JSON files of a report: then the page or one clear line, never a traceback."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatools import DataError

WRONG: list[Any] = [None, "text", -1, 1e400, [], {}, [None], {"a": "b"}, True]


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`, itself first."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*here, key))


def damages(value: Any, most: int, seed: int = 0) -> Iterator[Any]:
    """At most `most` copies of `value`, in each of which one value has another type or is missing."""
    every = [(place, how) for place in places(value) for how in [*WRONG, "missing"]]
    for place, how in random.Random(seed).sample(every, min(most, len(every))):
        damaged = copy.deepcopy(value)
        if not place:
            yield how
            continue
        inner = damaged
        for key in place[:-1]:
            inner = inner[key]
        if how == "missing":
            del inner[place[-1]]
        else:
            inner[place[-1]] = how
        yield damaged


def check(draw: Callable[[Path], Any], path: Path, most: int = 60) -> int:
    """Draw the folder of `path` with each damage; the files are put back. Returns: how many were refused."""
    before, page = path.read_text(encoding="utf-8"), path.with_name("report.html")
    drawn = page.read_bytes() if page.is_file() else None
    lines = path.suffix == ".jsonl"
    value = [json.loads(line) for line in before.splitlines()] if lines else json.loads(before)
    refused = 0
    try:
        for damaged in damages(value, most):
            rows = damaged if lines and isinstance(damaged, list) else [damaged]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            try:
                draw(path.parent)
            except DataError as error:
                assert "\n" not in str(error) and path.name in str(error), error
                refused += 1
    finally:
        path.write_text(before, encoding="utf-8")
        if drawn is not None:
            page.write_bytes(drawn)
    return refused
