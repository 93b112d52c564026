"""The example of every public class and function runs, and shows what it says."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import optim
from optim import OPTIMIZERS, RULES, api, curvature, curves, diagnostics, distributed, hf, linalg, zeroth_order
from tests.examples import failures

MODULES = (api, curvature, curves, diagnostics, distributed, hf, linalg, zeroth_order)
"""Where a user finds names; each public class and function of them needs an example."""

COVERED = set(RULES.values())
"""Rules, by the example of their optimizers."""


def public(module: Any) -> list[str]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return [name for name in names if inspect.isclass(vars(module)[name]) or inspect.isfunction(vars(module)[name])]


def things() -> Iterator[tuple[str, Any]]:
    """(where it is found, the class or function), each once."""
    seen: set[Any] = set()
    for module in MODULES:
        for name in public(module):
            thing = vars(module)[name]
            ours = thing.__module__.startswith("optim")
            own = module in (api,) or hasattr(module, "__all__") or thing.__module__ == module.__name__
            if ours and own and thing not in seen | COVERED and not issubclass_of(thing, Exception):
                seen.add(thing)
                yield f"{module.__name__}.{name}", thing


def issubclass_of(thing: Any, kind: type) -> bool:
    return inspect.isclass(thing) and issubclass(thing, kind)


THINGS = dict(things())


@pytest.mark.parametrize("where", THINGS)
def test_the_example_runs(where):
    thing = THINGS[where]
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    assert examples, f"{where} has no example: add `Example:` and lines with `>>>` to its docstring"
    test = doctest.DocTest(examples, {"torch": torch, "optim": optim}, where, None, None, None)
    assert not (said := failures(test)), said


def test_every_optimizer_and_every_new_name_is_asked_for():
    assert {kind.__name__ for kind in OPTIMIZERS.values()} <= {where.rpartition(".")[2] for where in THINGS}
    assert {"optim.api.create", "optim.api.schedule", "optim.zeroth_order.ZerothOrder"} <= set(THINGS)


def documented(text: str) -> list[str]:
    """The names in the section `Args:` of a docstring."""
    found = re.search(r"^Args:\n((?:    .*\n?|\n(?=    ))+)", text, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    heads = [match[1] for line in lines if (match := re.match(r"    (\*{0,2}\w+(?:, \w+)*): ", line))]
    return [name.strip("* ") for head in heads for name in head.split(",")]


@pytest.mark.parametrize("where", [*THINGS, *(f"rule {name}" for name in RULES)])
def test_documented_arguments_exist(where):
    thing = RULES[where.removeprefix("rule ")] if where.startswith("rule ") else THINGS[where]
    assert set(documented(inspect.getdoc(thing) or "")) <= set(inspect.signature(thing).parameters)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_keeps_and_where_it_is_from(name):
    text = inspect.getdoc(RULES[name]) or ""
    assert re.search(r"^State:\n    \S", text, re.MULTILINE) and re.search(r"^Source:\n    \S", text, re.MULTILINE)


def test_modules_import_by_their_names():
    assert all(importlib.import_module(module.__name__) is module for module in MODULES)
