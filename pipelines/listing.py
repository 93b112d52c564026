"""`datatools ls`: the available methods, read from the tables and from the records and docstrings in them."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datatools import UsageError, did_you_mean
from pipelines.settings import names

Rows = list[tuple[str, ...]]


def _section(text: str, name: str) -> str:
    """Return the text of the section `name:` of a docstring on one line."""
    found = re.search(rf"^{name}:\n((?:[ ]+.+\n?)+)", inspect.cleandoc(text), re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _first_sentence(thing: object) -> str:
    paragraph = " ".join(inspect.cleandoc(getattr(thing, "__doc__", None) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def _optimizers() -> Rows:
    import torch

    from optim import RULES, cpu_jit

    matrix = torch.empty(4, 4)  # what every rule takes
    rows: Rows = []
    for name, rule in sorted(RULES.items()):
        module = inspect.getmodule(rule)
        text = rule.__doc__ or ""
        memory = re.split(r"[,;(]| and ", _section(text, "State"))[0].strip()
        memory = re.sub(" bytes? per parameter", " B", memory[:1].lower() + memory[1:])
        source = re.split(r"[;,] | \(", _section(text, "Source"))[0].rstrip(".")
        called, colon, what = _first_sentence(module).partition(": ")  # "AdamW: Adam with ..."
        elementwise = "yes" if rule.elementwise else "no"
        path = "no" if cpu_jit.supports(rule(), matrix) else "compiled"
        rows.append((name, f"{(what if colon else called).rstrip('.')} ({source})", memory, elementwise, path))
    return rows


def _projectors() -> Rows:
    from datatools import PROJECTORS

    return _described(PROJECTORS)


def _selectors() -> Rows:
    from datatools import SELECTORS

    return _described({name: selector.choose for name, selector in SELECTORS.items()})


def _aggregations() -> Rows:
    from datatools import AGGREGATIONS

    return _described({name: aggregation.function for name, aggregation in AGGREGATIONS.items()})


def _schedules() -> Rows:
    from optim import SCHEDULES

    return _described(SCHEDULES)


def _described(table: Mapping[str, object]) -> Rows:
    return [(name, _first_sentence(thing)) for name, thing in table.items()]


def _methods() -> Rows:
    from pipelines.settings.methods import SCORERS, known

    found = {name: known(name) for name in SCORERS}
    return [(name, f"{one.summary}\nlimits: {one.limits}", one.cost) for name, one in found.items()]


def _estimators() -> Rows:
    facts = {name: partial(names.fact, "estimator", name) for name in names.known("estimator")}
    return [
        (name, f"{fact('title')} ({fact('source') or 'own'})", fact("once") or "", fact("each") or "")
        for name, fact in facts.items()
    ]


def _searches() -> Rows:
    from datatools import order

    return _described(order.SEARCHES)


def _checks() -> Rows:
    facts = {name: partial(names.fact, "check", name) for name in names.known("check")}
    return [(name, f"{fact('title')} ({fact('source') or 'own'})", fact("cost")) for name, fact in facts.items()]


def _coresets() -> Rows:
    from datatools import CORESET_METHODS

    return [(name, method.title, method.cost) for name, method in CORESET_METHODS.items()]


def _coreset_features() -> Rows:
    from datatools import CORESET_FEATURES

    return [(name, kind.title, kind.cost) for name, kind in CORESET_FEATURES.items()]


def _formats() -> Rows:
    from pipelines.rows.formats.table import FORMATS

    return [
        (known.title, f"{known.learned} ({known.used_by}); rendered {known.rendering}\n{known.example}")
        for known in FORMATS.values()
    ]


KINDS: dict[str, tuple[str, tuple[str, ...], Callable[[], Rows]]] = {
    "optimizers": (
        "--optimizer",
        ("name", "what it does (source)", "state", "element-\nwise", "fast path"),
        _optimizers,
    ),
    "schedules": ("train --schedule", ("name", "learning rate"), _schedules),
    "methods": ("--method", ("name", "rows are chosen by", "cost of the scores"), _methods),
    "projectors": ("--projector", ("name", "what it is"), _projectors),
    "aggregations": (
        "--set aggregate=NAME",
        ("name", "how the similarities to many target rows become one score"),
        _aggregations,
    ),
    "selectors": ("--selector", ("name", "which rows it takes"), _selectors),
    "estimators": (
        "order --estimators",
        ("name", "what it is (source)", "cost before scoring", "cost per score"),
        _estimators,
    ),
    "searches": ("order --search", ("name", "how orders are searched"), _searches),
    "checks": ("diagnose --checks", ("name", "what it measures (source)", "cost"), _checks),
    "coresets": ("train --coreset colm --set coreset.method=NAME", ("name", "which rows are kept", "cost"), _coresets),
    "features": ("--set coreset.features=NAME", ("name", "feature of a row", "cost"), _coreset_features),
    "formats": (
        "rows of --train, --target, --data",
        ("format", "what is learned (who uses it), how it is rendered, and an example"),
        _formats,
    ),
}
"""Kind -> where its names are used, the columns of its table, and a function that returns the rows."""


def rows(kind: str) -> Rows:
    """Return the rows of one list.

    Args:
        kind: A name in `KINDS`.

    Returns:
        One tuple per entry, with a text for each column.

    Raises:
        UsageError: The kind is unknown; the message names the nearest one.
    """
    if kind not in KINDS:
        raise UsageError(f"ls: there is no list of {kind!r}{did_you_mean(kind, KINDS)}")
    return KINDS[kind][2]()


def show(kind: str | None, console: Console | None = None) -> None:
    """Print one list, or the kinds of lists.

    Args:
        kind: A name in `KINDS`; None lists the kinds.
        console: Where to print; by default stdout.
    """
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    if kind is None:
        columns: tuple[str, ...] = ("datatools ls ...", "used with")
        lines: Rows = [(name, where) for name, (where, *_) in KINDS.items()]
    else:
        lines = rows(kind)
        columns = KINDS[kind][1]
    for number, column in enumerate(columns):
        short = number == 0 or ("\n" not in column and all(len(line[number]) <= len(column) + 3 for line in lines))
        table.add_column(Text(column), style="bold" if number == 0 else "", no_wrap=short, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)
    if kind == "formats":
        from pipelines.rows.input_files import PACKED, SUFFIXES

        files = f"{' '.join(SUFFIXES)}, each also with {' '.join(PACKED)}"
        console.print(Text(f"Files: {files}; folders of them; hub names as hf:NAME."))
