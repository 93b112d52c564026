"""Renders benchmark results as Markdown tables: `python -m tests.benchmarks.show [FOLDER or FILE ...]`."""

import json
import sys
from pathlib import Path

from tests.benchmarks.measure import RESULTS, render


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or [RESULTS]
    found = [file for path in paths for file in ([path] if path.suffix == ".json" else sorted(path.glob("*.json")))]
    if not found:
        print(f"no results in {', '.join(map(str, paths))}; run `make bench` first", file=sys.stderr)
        return 1
    print("\n".join(render(json.loads(file.read_text(encoding="utf-8"))) for file in found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
