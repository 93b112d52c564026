"""The examples in the docstrings of datatools and pipelines run and print what they say.

Those of optim, of which every public name must have one, are in tests/optim/test_doctests.py.
"""

import doctest
from importlib import import_module

import pytest

from tests.conftest import REPOSITORY

MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for package in ("datatools", "pipelines")
    for path in (REPOSITORY / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
HAVE_ONE = (
    "influence",
    "aggregate",
    "select",
    "fill",
    "Budget.parse",
    "Candidates",
    "Selection",
    "extract",
    "batch_rows",
    "GradientFeatures.create_or_open",
    "Projector.of",
    "token_batches",
    "micro_batches",
    "pieces",
    "herding",
    "facility_location",
    "estimator",
    "precompute",
    "load_surrogate",
    "search",
    "refine",
    "curricula",
    "exact_order",
    "train",
    "record",
    "judge",
    "prize",
    "calibrated",
    "break_even",
    "memory_map",
    "spearman",
    "t_interval",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = doctest.testmod(import_module(name))
    assert found.attempted and not found.failed


def test_what_users_call_has_an_example():
    found = {
        test.name.partition(f"{name}.")[2]
        for name in MODULES
        for test in doctest.DocTestFinder().find(import_module(name))
        if test.examples
    }
    assert not set(HAVE_ONE) - found
