"""The examples in the docstrings of datatools and pipelines run and print what they say.

Every class and function that the packages of datatools offer has one; that those of optim do is tested in
tests/optim/test_doctests.py.
"""

import doctest
import inspect
from importlib import import_module

import pytest

from tests.conftest import REPOSITORY
from tests.examples import failures

MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for package in ("datatools", "pipelines")
    for path in (REPOSITORY / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
PACKAGES = ("datatools", *(f"datatools.{part}" for part in ("colm", "files", "gradients", "order", "projectors")))
"""Where a user finds names."""
TABLES = ("less", "selection", "subsets")
"""Rooms whose modules each offer a method, by the name of the module or of a table."""


def offered(package):
    """The classes and functions that a package offers, each by its name there."""
    module = import_module(package)
    names = getattr(module, "__all__", None) or getattr(module, "_EXPORTS", None) or vars(module)
    for name in names:
        thing = getattr(module, name)
        ours = (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("datatools.")
        if ours and not name.startswith("_"):
            yield f"{package}.{name}", thing


def methods(room):
    """The function or class of the same name as its module, in each module of a room."""
    for path in (REPOSITORY / "datatools" / room).glob("[!_]*.py"):
        module = import_module(f"datatools.{room}.{path.stem}")
        if hasattr(module, path.stem):
            yield f"{module.__name__}.{path.stem}", getattr(module, path.stem)


THINGS = dict(pair for package in PACKAGES for pair in offered(package)) | dict(
    pair for room in TABLES for pair in methods(room)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    tests = [test for test in doctest.DocTestFinder().find(import_module(name)) if test.examples]
    assert tests and not (said := "".join(map(failures, tests))), said


def test_what_users_call_has_an_example():
    lacking = [name for name, thing in THINGS.items() if ">>> " not in (inspect.getdoc(thing) or "")]
    assert not lacking, f"no example in the docstring of {lacking}"


def test_what_users_call_is_found():
    names = {"datatools.CoLM", "datatools.colm.LastLayer", "datatools.files.write_json", "datatools.order.precompute"}
    assert names | {"datatools.subsets.herding.herding", "datatools.selection.top_k.top_k"} <= set(THINGS)
