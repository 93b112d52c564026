"""The server for command lines of the tests of pipelines."""

from tests.pipelines.conftest import command

__all__ = ["command"]
