"""The command line: flags, commands, and advice that fits the command."""

from pipelines.cli.app import main

__all__ = ["main"]
