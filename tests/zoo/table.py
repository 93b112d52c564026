"""The table of the zoo: class -> what each check gave.

python -m tests.zoo.table                      recompute everything, print what differs from table.json
python -m tests.zoo.table --write              and write it
python -m tests.zoo.table Mamba --only groups  classes whose name contains a word, some checks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("table.json")
REGENERATE = "python -m tests.zoo.table --write"
Entry = dict[str, Any]
"""check -> "right", "right 0.97" (with the covered share), or another kind and its note."""


def entry(name: str, only: Sequence[str] | None = None) -> Entry:
    """The checks of one class, as the table holds them."""
    import torch

    from tests.zoo import build, check

    torch.set_num_threads(1)
    with build.quiet():
        return {key: _cell(outcome) for key, outcome in check.check(name, only).items()}


def _cell(outcome: Any) -> str:
    share = "" if outcome.share is None else f" {outcome.share:g}"
    note = f": {outcome.note}" if outcome.note else ""
    return f"{outcome.kind}{share}{note}"


def verdict(cell: str) -> tuple[str, float | None]:
    """A cell without its note: what a run must repeat."""
    kind, _, share = cell.partition(":")[0].partition(" ")
    return kind, float(share) if share else None


def every() -> list[str]:
    """The classes of the zoo, and variants of some."""
    from tests.zoo.build import VARIANTS, names

    return sorted([*names(), *VARIANTS])


def read() -> dict[str, Any]:
    """table.json."""
    return json.loads(TABLE.read_text())  # type: ignore[no-any-return]


def write(found: Mapping[str, Entry]) -> None:
    """table.json, with what transformers it belongs to."""
    import transformers

    from tests.zoo.build import UNBUILDABLE

    whole = {
        "transformers": transformers.__version__,
        "regenerate": REGENERATE,
        "classes": dict(sorted(found.items())),
        "not in the zoo": dict(sorted(UNBUILDABLE.items())),
    }
    TABLE.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def compute(names: Sequence[str], only: Sequence[str] | None = None, processes: int = 2) -> Iterable[tuple[str, Entry]]:
    """(class, its entry) of each, as they are done."""
    if processes < 2:
        yield from ((name, entry(name, only)) for name in names)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from zip(names, pool.map(entry, names, [only] * len(names)), strict=True)


def differences(name: str, got: Entry, want: Entry | None) -> list[str]:
    """Where a class's entry is not the table's: a line each, regressions and improvements alike."""
    if want is None:
        return [f"{name}: not in the table"]
    return [
        f"{name}, {key}: {got.get(key)} (the table says {want.get(key)})"
        for key in got
        if key not in want or verdict(got[key]) != verdict(want[key])
    ]


def summary(found: Mapping[str, Entry]) -> str:
    """Counts by check, and of whole classes: right where every check is, else the worst kind."""
    order = ("right", "refused", "wrong", "crash")
    lines = [f"{'check':<12}" + "".join(f"{kind:>9}" for kind in order)]
    keys = list(dict.fromkeys(key for cells in found.values() for key in cells))
    for key in keys:
        count = Counter(verdict(cells[key])[0] for cells in found.values() if key in cells)
        lines.append(f"{key:<12}" + "".join(f"{count[kind]:>9}" for kind in order))
    whole = Counter(max((verdict(cell)[0] for cell in cells.values()), key=order.index) for cells in found.values())
    lines.append(f"{'all':<12}" + "".join(f"{whole[kind]:>9}" for kind in order) + f"   of {len(found)} classes")
    for key in ("gradients", "lora"):
        shares = [v[1] for cells in found.values() if key in cells and (v := verdict(cells[key]))[1] is not None]
        if shares:
            enough = sum(share >= 0.9 for share in shares)
            lines.append(
                f"{key}: at least 90 % of the matrix numbers covered in {enough} of {len(found)} classes, "
                f"mean {sum(shares) / len(shares):.3f}"
            )
    return "\n".join(lines)


def main() -> int:
    from tests.zoo.check import CHECKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of class names; all without")
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="a check (several times for more)")
    parser.add_argument("--write", action="store_true", help="write table.json")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    chosen = [name for name in every() if not asked.words or any(word in name for word in asked.words)]
    before = read()["classes"] if TABLE.is_file() else {}
    found: dict[str, Entry] = {}
    apart = []
    for name, cells in compute(chosen, asked.only, asked.processes):
        found[name] = cells
        apart += differences(name, cells, before.get(name))
        if asked.words:
            print(name, json.dumps(cells, indent=1, ensure_ascii=False))
    print("\n".join([*apart, summary(found)]))
    if apart and not asked.write:
        print(f"The table says otherwise in {len(apart)} places; if that is meant: {REGENERATE}")
    if asked.write:
        kept = {name: before.get(name, {}) for name in every()} if asked.words or asked.only else {}
        write({**kept, **{name: {**kept.get(name, {}), **cells} for name, cells in found.items()}})
    return 1 if apart and not asked.write else 0


if __name__ == "__main__":
    sys.exit(main())
