"""The command line: flags, commands, and advice that fits the command."""

from pipelines.cli.app import app, main

__all__ = ["app", "main"]
