"""`datatools ls`: a row for each entry of a table, something said about it, and room in a narrow terminal."""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import optim
from datatools import AGGREGATIONS, CORESET_FEATURES, CORESET_METHODS, PROJECTORS, SELECTORS, UsageError, order
from pipelines import listing
from pipelines.diagnose.checks import CHECKS
from pipelines.rows.formats.table import FORMATS, read_shape
from pipelines.settings.methods import SCORERS

TABLES = {
    "optimizers": optim.RULES,
    "schedules": optim.SCHEDULES,
    "projectors": PROJECTORS,
    "aggregations": AGGREGATIONS,
    "selectors": SELECTORS,
    "methods": SCORERS,
    "estimators": order.ESTIMATORS,
    "searches": order.SEARCHES,
    "checks": CHECKS,
    "coresets": CORESET_METHODS,
    "features": CORESET_FEATURES,
    "formats": {known.title for known in FORMATS.values()},
}


@pytest.mark.parametrize("kind", listing.KINDS)
def test_tables_are_complete_and_say_something(kind):
    rows = listing.rows(kind)
    assert sorted(row[0] for row in rows) == sorted(TABLES[kind])
    assert all(len(row) == len(listing.KINDS[kind][1]) and all(cell.strip() for cell in row) for row in rows), rows


@pytest.mark.parametrize("kind", [None, *listing.KINDS])
def test_eighty_columns(kind):
    screen = io.StringIO()
    listing.show(kind, Console(file=screen, width=80))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in screen.getvalue()
    assert all(name in screen.getvalue() for name in (TABLES[kind] if kind else listing.KINDS))


def test_optimizers_are_described_by_themselves():
    """State bytes are those that `init` makes; elementwise and fast path are what the rule and the engine say."""
    weight = torch.empty(64, 64)
    for name, what, state, elementwise, path in listing.rows("optimizers"):
        rule = optim.RULES[name]()
        plain = rule.init(weight).values()
        if getattr(rule, "momentum", None) == 0.0 and state != "0 B" and not any(v.dim() > 0 for v in plain):
            rule = replace(rule, momentum=0.9)  # its only state, which is off by default
        made = sum(v.numel() * v.element_size() for v in rule.init(weight).values() if v.dim() > 0)
        assert state.removeprefix("at most ").partition(" of ")[0] == f"{made // weight.numel()} B", name
        assert elementwise == ("yes" if rule.elementwise else "no")
        assert (path == "compiled") == (optim.cpu_jit.supports(rule, weight) == ""), name
        assert re.search(r"\((.*\d{4}|.*torch.*)\)$", what), name


def test_unknown_kind():
    with pytest.raises(UsageError, match="did you mean 'formats'"):
        listing.rows("format")


@pytest.mark.parametrize("name", FORMATS)
def test_examples_of_formats_are_read(name):
    shape = read_shape(json.loads(FORMATS[name].example), preference="chosen")
    assert shape.messages or shape.text or shape.completion
