"""`datatools ls`: a row for each entry of a table, something said about it, and room in a narrow terminal."""

import io
import json

import pytest
from rich.console import Console

import optim
from datatools import AGGREGATIONS, PROJECTORS, SELECTORS, UsageError
from pipelines import listing
from pipelines.config import ARMS, METHODS, NEED_TARGET, AuditConfig, SelectConfig
from pipelines.formats import read_shape

TABLES = {
    "optimizers": optim.RULES,
    "schedules": optim.SCHEDULES,
    "projectors": PROJECTORS,
    "aggregations": AGGREGATIONS,
    "selectors": SELECTORS,
    "methods": METHODS,
    "formats": listing.FORMATS,
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


def test_unknown_kind():
    with pytest.raises(UsageError, match="did you mean 'formats'"):
        listing.rows("format")


@pytest.mark.parametrize("name", listing.FORMATS)
def test_examples_of_formats_are_read(name):
    shape = read_shape(json.loads(listing.FORMATS[name][1]))
    assert shape.messages or shape.text or shape.completion


def test_methods_are_those_of_the_settings():
    assert set(METHODS) == set(SelectConfig.model_fields["method"].annotation.__args__) and set(NEED_TARGET) <= set(
        METHODS
    )
    members = AuditConfig.model_fields["against"].annotation
    assert set(ARMS) == set(members.__args__[0].__args__) and set(ARMS) - {"full"} <= set(METHODS)
