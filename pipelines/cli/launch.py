"""From typed arguments to a pipeline: the settings are built, checked, and printed or run."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from pipelines.settings.base import Settings


def launch(
    command: str,
    model: type[Settings],
    entry: str,
    yaml: Path | None,
    flags: Mapping[str, object],
    sets: Sequence[str] = (),
    *,
    print_config: bool = False,
    quiet: bool = False,
    talks: bool = False,
    **base: Any,
) -> None:
    """Build the settings and run a pipeline with them, or print the settings.

    Args:
        command: The name of the command.
        model: The class of its settings.
        entry: "module:function" of the pipeline, which takes the settings.
        yaml: A file with settings.
        flags: Dotted name -> value of the given flags; None is "not given".
        sets: The texts of --set.
        print_config: Whether to print the settings instead.
        quiet: Whether to show only warnings and errors.
        talks: Whether the pipeline itself writes to stdout, rather than returning what to print.
        **base: `base` and `base_name` of `load_config`: the settings of the run that the command builds on.
    """
    from pipelines.runs import current, messages, signals, workers
    from pipelines.settings.dump import dump
    from pipelines.settings.load import load_config

    config = load_config(model, yaml, flags, sets, **base)
    if print_config:
        typer.echo(dump(config, comments=True), nl=False)
        return
    from pipelines.rows import preflight

    preflight.check(config, command)
    current.opened(None)
    module, _, function = entry.partition(":")
    with messages.quietly(quiet), signals.interruptible():
        try:
            # stdout is reserved for the result, whatever a library prints
            with nullcontext() if talks else redirect_stdout(sys.stderr):
                result = getattr(import_module(module), function)(config)
        except KeyboardInterrupt as interrupt:
            code = 143 if isinstance(interrupt, signals.Terminated) else 130
            print(f"\ninterrupted: {signals.how_to_continue()}", file=sys.stderr)
            raise typer.Exit(code) from None
    if not workers.leads() or getattr(config, "dry_run", False):
        return
    if isinstance(result, dict) and not talks:
        typer.echo(json.dumps(result, ensure_ascii=True, allow_nan=False))
    elif isinstance(result, Path):
        typer.echo(str(result))
