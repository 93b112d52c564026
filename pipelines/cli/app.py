"""The command `datatools`. Expected errors are one line on stderr.

Exit codes: 0, 1 (a bug), 2 (usage), 3 (data), 4 (environment), 130 (Ctrl-C), 143 (SIGTERM).
"""

import errno
import itertools
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pipelines.cli import commands
from pipelines.runs import threads

app = typer.Typer(
    name="datatools",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Find the training rows that improve a language model on your task, and measure how much they do.\n\n"
    "\b\nStart with `datatools demo`,\nthen `datatools select --help`.\nIf something fails, run `datatools doctor`.",
)
commands.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"datatools {version('datatools-llm')}")
        except PackageNotFoundError:
            typer.echo("datatools, not installed as a package")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and exit", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code. Expected errors print one line on stderr; other errors print their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    threads.choose(command=True)  # before torch is loaded
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="datatools", standalone_mode=False)
    except Exception as error:
        return _report(error, arguments)
    return code if isinstance(code, int) else 0


_MACHINE = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EROFS", "EMFILE", "ENFILE", "EIO"),
        *("ENAMETOOLONG", "ELOOP", "EPERM", "ENXIO", "ENODEV", "ESTALE", "ETIMEDOUT", "ENOTCONN"),  # odd paths, mounts
    )
    if hasattr(errno, name)
}


def _report(error: Exception, arguments: Sequence[str]) -> int:
    from datatools import DatatoolsError, EnvironmentProblem

    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: wrong options and arguments
        if type(error).__name__ == "NoArgsIsHelpError":  # the bare command
            typer.echo(error.format_message(), err=True)
            return 2
        command = f" {arguments[0]}" if arguments and not arguments[0].startswith("-") else ""
        message = " ".join(str(error.format_message()).split())
        options = getattr(getattr(error, "param", None), "opts", [])
        came = [value for option, value in itertools.pairwise(arguments) if option in options]
        if came and repr(came[-1]) not in message:
            message = f"{message.rstrip('.')}; you gave {came[-1]!r}"
        return _complain(f"{message.rstrip('.')}; see datatools{command} --help", 2)
    if isinstance(error, DatatoolsError):
        from pipelines.cli.advice import fitting

        return _complain(fitting(str(error), arguments[0] if arguments else "", flags_of_commands()), error.exit_code)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        from datatools import files

        known = files.explain(error, error.filename or "a file", "use")
        if error.errno in _MACHINE:
            return _complain(str(known), known.exit_code)
    full = isinstance(error, MemoryError)
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from datatools import is_out_of_memory

        full = is_out_of_memory(error)
    if full:
        advice = "use smaller batches (--set features.token_budget=512 or training.micro_tokens=512) or shorter rows"
        return _complain(f"out of memory: {advice}", EnvironmentProblem.exit_code)

    import traceback

    traceback.print_exception(error)
    print(
        "\nThis is a bug in datatools. Please report it with the lines above, the command, and the output of "
        "`datatools doctor --json`.",
        file=sys.stderr,
    )
    return 1


def flags_of_commands() -> dict[str, set[str]]:
    """Return the flags of each command."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    return {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in commands.items()
    }


def _complain(message: str, code: int) -> int:
    from pipelines.settings import redaction
    from pipelines.texts import visible

    print(f"error: {visible(redaction.hide(message), keep=chr(10))}", file=sys.stderr)  # terminals are logged, too
    return code


if __name__ == "__main__":
    sys.exit(main())
