"""No code but a method's own file and its table knows the method by name; everything else asks the method's record.

A comparison with a name (`==`, `in`, `match`, a key of a dict) is one more place to change when somebody adds a method,
and nothing says so.
"""

import ast
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_layering import PACKAGES, modules, report

TABLES = {  # what: (module, table, packages whose code may know such names)
    "scorer": ("pipelines.settings.methods", "SCORERS", ("pipelines",)),
    "row format": ("pipelines.rows.formats.table", "FORMATS", ("pipelines",)),
    "selector": ("datatools", "SELECTORS", ("datatools", "pipelines")),
    "aggregation": ("datatools", "AGGREGATIONS", ("datatools", "pipelines")),
    "coreset method": ("datatools", "CORESET_METHODS", ("datatools", "pipelines")),
    "coreset feature": ("datatools", "CORESET_FEATURES", ("datatools", "pipelines")),
    "estimator": ("datatools.order", "ESTIMATORS", ("datatools", "pipelines")),
    "projector": ("datatools", "PROJECTORS", ("datatools", "pipelines")),
    "optimizer": ("optim", "OPTIMIZERS", PACKAGES),
    "update rule": ("optim", "RULES", PACKAGES),
    "schedule": ("optim", "SCHEDULES", PACKAGES),
}
COLUMNS = {"messages", "text", "auto"}
"""Row formats that are called as the one column that they have, and the method that is called as the value of many
other settings that leave a choice to the program: a comparison with these says nothing."""

PLAIN_WORDS = {"constant", "linear", "cosine", "polynomial", "mean", "max", "root", "scale", "loss", "table", "groups"}
"""Names that are words of the code besides: as keys of a dict they say nothing, compared they count."""

ANOTHER_MEANING: dict[str, set[str]] = {
    "optim/cpu_jit/assembly.py": {"constant"},  # a node that is a constant
    "optim/cpu_jit/kinds.py": {"constant"},  # the same
    "optim/cpu_jit/layout.py": {"constant", "root"},  # the same; a square root
    "optim/linalg.py": {"dion"},  # coefficients that are called after it
    "optim/rules/muon.py": {"dion"},  # a published code of Muon
    "optim/rules/normuon.py": {"dion"},  # the same
    "optim/rules/shampoo.py": {"adagrad", "adam"},  # graftings
    "optim/rules/mars.py": {"adamw", "lion"},  # the two forms
    "optim/rules/matrices.py": {"adamw"},  # the part of a group's settings that is for AdamW
    "optim/rules/wrappers/coding.py": {"linear"},  # a code of quantized values
    "datatools/colm/history.py": {"adam"},  # a history of Adam moments, not an optimizer
    "datatools/features/neighbours.py": {"exact"},  # a search
    "datatools/subsets/facility_location.py": {"cosine"},  # a metric
    "datatools/order/estimators/fut.py": {"exact"},  # a derivative
    "datatools/order/estimators/moments.py": {"exact"},  # gradients
    "datatools/order/search.py": {"random"},  # a search, in the table of searches
    "pipelines/colm/given.py": {"adam"},  # a history of Adam moments
    "pipelines/colm/choosing.py": {"loss"},  # the loss in a log
    "pipelines/diagnose/checks/smoothness.py": {"probes"},  # a setting
    "pipelines/models/finite.py": {"loss"},  # the loss in a log
    "pipelines/report/order_sections.py": {"span"},  # the width of an interval
    "pipelines/rows/formats/loss_marks.py": {"loss"},  # a column with the loss of a row
    "pipelines/select/less.py": {"paper"},  # a form of Adam's update
    "pipelines/select/neighbours.py": {"exact", "random"},  # a search; how many clusters a random choice reaches
    "pipelines/select/objectives.py": {"preference"},  # the setting
    "pipelines/settings/select.py": {"preference"},  # the setting
    "pipelines/training/checkpoints.py": {"paper"},  # a form of Adam's update
    "pipelines/training/fit.py": {"loss"},  # the loss in a log
}
"""File -> words that are compared there and mean something else than a method."""

STILL_COMPARED: dict[str, set[str]] = {}
"""File -> methods that its code still knows by name. This may only shrink: what is no longer true fails the test."""


def names(package: str) -> set[str]:
    """The names of methods that code of `package` could know."""
    tables = [
        getattr(import_module(module), table) for module, table, packages in TABLES.values() if package in packages
    ]
    return set().union(*tables) - COLUMNS


def constants(node: ast.AST | None) -> Iterator[str]:
    """The strings of a constant, or of a tuple, list or set of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for inner in node.elts:
            yield from constants(inner)


def compared(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, string) of what is compared with a constant, and of the keys of dicts that are no table of methods."""
    tables = {table for _, table, _ in TABLES.values()}
    exempt = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in tables for target in targets):
                exempt.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from ((node.lineno, text) for side in (node.left, *node.comparators) for text in constants(side))
        elif isinstance(node, ast.MatchValue):
            yield from ((node.lineno, text) for text in constants(node.value))
        elif isinstance(node, ast.Dict) and node not in exempt:
            keys = ((key.lineno, text) for key in node.keys if key is not None for text in constants(key))
            yield from ((line, text) for line, text in keys if text not in PLAIN_WORDS)


def known(where: str, tree: ast.Module, methods: set[str]) -> Mapping[str, int]:
    """Method -> the first line at which a file that is not the method's own compares with its name."""
    own = Path(where).stem.replace("_", "-")
    found: dict[str, int] = {}
    for line, name in compared(tree):
        if name in methods and name.replace("_", "-") != own:
            found[name] = min(line, found.get(name, line))
    return found


def test_methods_are_known_by_their_records_alone():
    errors = []
    gone = {(where, name) for table in (ANOTHER_MEANING, STILL_COMPARED) for where in table for name in table[where]}
    for package in PACKAGES:
        methods = names(package)
        for where, tree in modules(package):
            found = known(where, tree, methods)
            gone -= {(where, name) for name in found}
            listed = ANOTHER_MEANING.get(where, set()) | STILL_COMPARED.get(where, set())
            new = sorted(found.keys() - listed)
            errors += [
                f"{where}:{found[name]}: compares with '{name}'; ask the method's record instead" for name in new
            ]
    report(errors)
    report([f"{where}: no longer compares with '{name}'; take it out of the list" for where, name in sorted(gone)])


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("if name == 'less': pass", {"less": 1}),
        ("x = 1\nif 'less' != name: pass", {"less": 2}),
        ("if name in ('less', 'rds'): pass", {"less": 1, "rds": 1}),
        ("if 'rds' in names: pass", {"rds": 1}),
        ("match name:\n    case 'less' | 'rds': pass", {"less": 2, "rds": 2}),
        ("TITLES = {'less': 'LESS'}", {"less": 1}),
        ("SCORERS = {'less': less}\nSCORERS: T = {'rds': rds}", {}),
        ("f('less')\nx['less']\nname = 'less'", {}),
        ("x = {'loss': 1}", {}),
        ("if name == 'loss': pass", {"loss": 1}),
    ],
)
def test_comparisons_are_seen(source, want):
    assert known("pipelines/select/run.py", ast.parse(source), {"less", "rds", "loss"}) == want
    own = known("pipelines/select/less.py", ast.parse(source), {"less", "rds", "loss"})
    assert own == {name: line for name, line in want.items() if name != "less"}
