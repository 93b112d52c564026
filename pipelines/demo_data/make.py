"""Write the demo's pool.jsonl, target.jsonl and test.jsonl: `python -m pipelines.demo_data.make`.

With a folder as argument, the files are written there, with the target as dev.jsonl, for the commands of the
documentation.

Everything in `bookings.py`, `knowledge.py` and `office.py` was written by hand for this project: sentences, word lists
and facts. Values that can be computed (sums, dates, sorted lists, JSON) are computed. The rows depend only on these
files: their order comes from hashes, not from a random generator whose stream may change between Python versions.

The target is a format that no base model knows: a booking, described in a sentence, becomes the line `city: Lyon |
day: 1 Jan | cost: 54 EUR`. 24 of the 240 pool rows teach this format, with other words than the target and from three
sources; `relevant_ids` names them. Decoys share the target's topic, cities or wording but have other answers.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from datatools import DatatoolsError, UsageError, files
from pipelines.demo_data.bookings import TARGET_SENTENCES, target_rows
from pipelines.demo_data.examples import Example, json_line
from pipelines.demo_data.knowledge import arithmetic_rows, facts_rows, grammar_rows, words_rows
from pipelines.demo_data.office import (
    calendar_rows,
    code_rows,
    lists_rows,
    notes_rows,
    records_rows,
    reviews_rows,
    units_rows,
)

FOLDER = Path(__file__).parent
SEED = 0
TARGET_ROWS = 8  # the other bookings are test rows

# source -> rows in the pool, duplicates included
SOURCES = {
    "facts": 44,
    "words": 36,
    "arithmetic": 32,
    "grammar": 28,
    "records": 24,
    "reviews": 20,
    "notes": 16,
    "calendar": 14,
    "lists": 10,
    "units": 8,
    "code": 8,
}


def _duplicates(examples: Sequence[Example]) -> list[Example]:
    """Return five rows that repeat earlier ones: three exactly (one with other spaces), two nearly."""

    def find(start: str) -> Example:
        (found,) = (e for e in examples if e.user.startswith(start))
        return found

    glacier, bees = find("What is a glacier?"), find("What do you call a group of bees?")
    weeks, guide = find("How many days are in 5 weeks?"), find("A guide showed us")
    guest = find("How many stars from one to five would this guest give? The pillow")
    return [
        glacier,
        replace(bees, user=bees.user.replace(" group of", "  group of")),
        replace(weeks, source="units"),
        replace(guide, answer=guide.answer.rstrip(".")),
        replace(guest, answer=guest.answer.replace("broken.", "broken!")),
    ]


def _shuffled(examples: Iterable[Example], name: str) -> list[Example]:
    """Return rows in the order of a hash of seed, name and text; equal texts differ by their position."""

    def key(item: tuple[int, Example]) -> bytes:
        i, e = item
        return hashlib.blake2b(f"{SEED}\0{name}\0{i}\0{e.user}\0{e.answer}".encode(), digest_size=16).digest()

    return [e for _, e in sorted(enumerate(examples), key=key)]


def _numbered(examples: Iterable[Example], name: str | None = None) -> dict[str, Example]:
    """Return the ids NAME-001, NAME-002, ... in order; by source without a name."""
    counts: dict[str, int] = {}
    result = {}
    for e in examples:
        prefix = name or e.source
        counts[prefix] = counts.get(prefix, 0) + 1
        result[f"{prefix}-{counts[prefix]:03d}"] = e
    return result


@cache
def _pool() -> dict[str, Example]:
    parts = (
        facts_rows,
        words_rows,
        arithmetic_rows,
        grammar_rows,
        records_rows,
        reviews_rows,
        notes_rows,
        calendar_rows,
        lists_rows,
        units_rows,
        code_rows,
    )
    examples = [e for part in parts for e in part()]
    pool = _numbered(_shuffled([*examples, *_duplicates(examples)], "pool"))
    counts = {source: sum(e.source == source for e in pool.values()) for source in SOURCES}
    assert counts == SOURCES, f"pool rows by source: {counts}"
    return pool


def _target_and_test() -> tuple[dict[str, Example], dict[str, Example]]:
    """Return the first rows of each subtask in hash order as the target, and all others as test rows."""
    target: list[Example] = []
    test: list[Example] = []
    for subtask in TARGET_SENTENCES:
        rows = _shuffled((e for e in target_rows() if e.subtask == subtask), subtask)
        n = TARGET_ROWS // len(TARGET_SENTENCES)
        target += rows[:n]
        test += rows[n:]
    return _numbered(_shuffled(target, "target"), "target"), _numbered(_shuffled(test, "test"), "test")


def _jsonl(rows: dict[str, Example]) -> bytes:
    lines = []
    for name, e in rows.items():
        messages = [{"role": "user", "content": e.user}, {"role": "assistant", "content": e.answer}]
        row: dict[str, object] = {"dataset": e.source, "id": name, "messages": messages}
        if e.subtask is not None:
            row["subtask"] = e.subtask
        lines.append(json_line(row) + "\n")
    return "".join(lines).encode()


def relevant_ids() -> frozenset[str]:
    """Return the ids of the 24 pool rows that answer in the target's format, by which a selection can be judged."""
    return frozenset(name for name, e in _pool().items() if e.relevant)


def contents() -> dict[str, bytes]:
    """Return file name -> its bytes, UTF-8 JSON lines."""
    target, test = _target_and_test()
    return {"pool.jsonl": _jsonl(_pool()), "target.jsonl": _jsonl(target), "test.jsonl": _jsonl(test)}


def write(folder: Path = FOLDER) -> None:
    """Write the three files, replacing older ones.

    Args:
        folder: The folder of the files.
    """
    for name, data in contents().items():
        files.write_bytes(folder / name, data)


def copy(folder: Path) -> None:
    """Write the rows under the names of the documentation: pool.jsonl, dev.jsonl (the target) and test.jsonl.

    Args:
        folder: The folder of the files, which is created if it is missing.

    Raises:
        UsageError: One of the files exists already; nothing is written.
    """
    named = {name.replace("target", "dev"): data for name, data in contents().items()}
    folder = files.make_folder(folder)
    if there := [name for name in named if (folder / name).exists()]:
        raise UsageError(f"{folder / there[0]} exists already; move it, or name another folder")
    for name, data in named.items():
        files.write_bytes(folder / name, data)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write()
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        try:
            copy(Path(sys.argv[1]))
        except DatatoolsError as error:
            sys.exit(f"error: {error}")
    else:
        sys.exit("usage: python -m pipelines.demo_data.make [FOLDER]")
