"""Draw the structure of the packages from their imports: rooms, floors, arrows, cycles and lengths.

    python -m tests.structure                    # this checkout
    python -m tests.structure --before DIR       # beside another checkout
    python -m tests.structure --json             # the same facts for a program
    python -m tests.structure --mermaid          # a diagram per package, which GitHub and mkdocs draw

A *room* is a folder of a package, or a file at its root. An *arrow* says that one room (or file) imports another of
the same package, also inside a function (a *lazy* import). The *floor* of a room is the length of the longest chain of
arrows below it: a room on floor 1 imports no other room. The rooms of a cycle share a floor. Imports for type checkers
alone are no arrows, but cycles are found through them too.
"""

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("optim", "datatools", "pipelines")
LONG = 400
DOOR = "__init__.py"
HOW = ("", "lazy", "types")
Arrows = dict[str, set[str]]


@dataclass(frozen=True)
class Package:
    """The files of a package, named by their path below it, and what each imports of the same package.

    Attributes:
        name: of the package.
        lines: number of lines per file.
        imports: file -> imported file -> how: `""` when it is loaded, `"lazy"` inside functions alone, or `"types"` for
            type checkers alone.

    """

    name: str
    lines: Mapping[str, int]
    imports: Mapping[str, Mapping[str, str]]

    def arrows(self, *, types: bool = False) -> Arrows:
        """The arrows between files."""
        return {
            file: {o for o, how in others.items() if types or how != "types"} for file, others in self.imports.items()
        }

    def rooms(self, *, types: bool = False) -> Arrows:
        """The rooms and the arrows between them; the package's own __init__ is the door, not a room."""
        found: Arrows = {room(file): set() for file in self.lines if file != DOOR}
        for file, others in self.arrows(types=types).items():
            if file != DOOR:
                found[room(file)] |= {room(other) for other in others - {DOOR}} - {room(file)}
        return found


def room(file: str) -> str:
    """`select/` of `select/less.py`, `texts.py` of `texts.py`."""
    return f"{file.split('/')[0]}/" if "/" in file else file


def read(code: Path, name: str) -> Package:
    """Read a package of the checkout `code`."""
    paths = {str(p.relative_to(code / name)): p for p in sorted((code / name).rglob("*.py"))}
    modules = {_module(name, file): file for file in paths}
    lines, arrows = {}, {}
    for file, path in paths.items():
        text = path.read_text(encoding="utf-8")
        lines[file] = len(text.splitlines())
        found = dict[str, str]()
        for imported, how in _imports(name, file, ast.parse(text)):
            other = modules.get(imported) or modules.get(imported.rpartition(".")[0])  # a module, or a name in one
            if other is not None and other != file:
                found[other] = min(found.get(other, how), how, key=HOW.index)
        arrows[file] = found
    return Package(name, lines, arrows)


def _module(package: str, file: str) -> str:
    return ".".join([package, *Path(file).with_suffix("").parts]).removesuffix(".__init__")


def _imports(package: str, file: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What is imported, and how."""
    parents = (package, *Path(file).parts[:-1])
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, how = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, how) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from ((f"{module}.{alias.name}", how) for alias in node.names)
        for inner in ast.iter_child_nodes(node):
            if isinstance(node, ast.If) and inner in node.body and "TYPE_CHECKING" in ast.dump(node.test):
                waiting.append((inner, "types"))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting.append((inner, how or "lazy"))
            else:
                waiting.append((inner, how))


def cycles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Per strongly connected set of more than one node its shortest cycle, starting at the first name."""
    reach = {node: _reachable(node, arrows) for node in arrows}
    sets = {frozenset(other for other in reach[node] if node in reach[other]) for node in arrows if node in reach[node]}
    return sorted(min((_shortest(node, arrows) for node in sorted(group)), key=len) for group in sets)


def _reachable(start: str, arrows: Mapping[str, Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [*arrows[start]]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += arrows[node]
    return seen


def _shortest(start: str, arrows: Mapping[str, Iterable[str]]) -> list[str]:
    paths = [[start]]
    seen = set[str]()
    while True:
        following = []
        for path in paths:
            for node in sorted(arrows[path[-1]]):
                if node == start:
                    return path
                if node not in seen:
                    seen.add(node)
                    following.append([*path, node])
        paths = following


def floors(arrows: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """The floor of every node."""
    reach = {node: _reachable(node, arrows) for node in arrows}
    found: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in found:
            same = {other for other in reach[node] if node in reach[other]} | {node}
            below = {other for member in same for other in arrows[member]} - same
            level = 1 + max((floor(other) for other in below), default=0)
            found.update(dict.fromkeys(same, level))
        return found[node]

    for node in arrows:
        floor(node)
    return found


def facts(package: Package) -> dict[str, Any]:
    """What is drawn, as numbers and names."""
    rooms, files = package.rooms(), package.arrows()
    level = floors(rooms)
    longest = max(package.lines, key=lambda file: package.lines[file])
    return {
        "folders": sum(name.endswith("/") for name in rooms),
        "root files": sum(not name.endswith("/") for name in rooms),
        "floors": max(level.values(), default=0),
        "arrows between rooms": sum(len(others) for others in rooms.values()),
        "arrows between files": sum(len(others) for others in files.values()),
        "lazy arrows": sum(list(others.values()).count("lazy") for others in package.imports.values()),
        "room cycles": [" -> ".join([*c, c[0]]) for c in cycles(package.rooms(types=True)) if "/" in "".join(c)],
        "file cycles": [_drawn(cycle, package) for cycle in cycles(package.arrows(types=True))],
        "files": len(package.lines),
        "lines": sum(package.lines.values()),
        "median lines": statistics.median(package.lines.values()),
        "longest file": f"{longest} {package.lines[longest]}",
        f"over {LONG} lines": sorted(file for file, lines in package.lines.items() if lines > LONG),
        "rooms": {name: {"floor": level[name], "imports": sorted(rooms[name])} for name in sorted(rooms)},
    }


def _drawn(cycle: Sequence[str], package: Package) -> str:
    drawn = cycle[0]
    for one, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        how = package.imports[one][other]
        drawn += f" {f'-{how}->' if how else '->'} {other}"
    return drawn


def table(sides: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Lines: the numbers of every package, side by side, then what stands behind them on the last side."""
    for name in PACKAGES:
        yield f"\n{name:24s}" + "".join(f"{side:>34s}" for side in sides)
        found = [side[name] for side in sides.values()]
        for key, value in found[-1].items():
            if key != "rooms":
                cells = [len(one[key]) if isinstance(value, list) else one[key] for one in found]
                yield f"  {key:22s}" + "".join(f"{cell!s:>34s}" for cell in cells)
        last = found[-1]
        for key in ("room cycles", "file cycles", f"over {LONG} lines"):
            yield from (f"  {key}: {one}" for one in last[key])
        for floor in range(last["floors"], 0, -1):
            for one, room_ in last["rooms"].items():
                if room_["floor"] == floor:
                    yield f"  floor {floor:2d}  {one:22s} {' '.join(room_['imports'])}"


def mermaid(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A flow chart per package: a box per room, an arrow per arrow, floors from the top down."""
    for name, package in found.items():
        yield f"```mermaid\n---\ntitle: {name}, {package['floors']} floors\n---\nflowchart TD"
        rooms = package["rooms"]
        number = {room_: f"r{i}" for i, room_ in enumerate(sorted(rooms, key=lambda r: -rooms[r]["floor"]))}
        yield from (f'  {number[one]}["{one}"]' for one in number)
        yield from (f"  {number[one]} --> {number[other]}" for one in number for other in rooms[one]["imports"])
        yield "```"


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, default=REPOSITORY, help="a checkout [default: this one]")
    parser.add_argument("--before", type=Path, help="another checkout, to stand beside it")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true")
    shape.add_argument("--mermaid", action="store_true")
    given = parser.parse_args(argv)
    codes = {"before": given.before, "now": given.code} if given.before else {"now": given.code}
    sides = {side: {name: facts(read(code, name)) for name in PACKAGES} for side, code in codes.items()}
    if given.json:
        print(json.dumps(sides if given.before else sides["now"], indent=1))
    else:
        print("\n".join(mermaid(sides["now"]) if given.mermaid else table(sides)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
