"""The examples in the docstrings of the settings run and print what they say."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["dump", "load", "redaction", "reference", "yaml"])
def test_examples_run(name):
    found = doctest.testmod(import_module(f"pipelines.settings.{name}"))
    assert found.attempted and not found.failed
