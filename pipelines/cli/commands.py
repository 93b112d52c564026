"""The commands: their settings, the pipeline that each runs, and how each reads its arguments.

A command with settings is one entry of `COMMANDS`: its flags, help and examples come from its settings. The other
commands are functions. No heavy module is imported before a command needs it, so that help is fast.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from datatools import UsageError
from optim.unknown import did_you_mean
from pipelines.cli import flags, help
from pipelines.cli.launch import launch
from pipelines.settings.audit import AuditConfig
from pipelines.settings.base import Settings, home, refuse_url
from pipelines.settings.demo import DemoConfig
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.explain import ExplainConfig, NeighboursConfig
from pipelines.settings.flags import values_of
from pipelines.settings.order import ORDER_TASKS, OrderConfig
from pipelines.settings.plan import PlanConfig
from pipelines.settings.select import SelectConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig

Given = dict[str, Any]
"""Parameter name -> the value that was typed; None if it was not given."""


@dataclass(frozen=True)
class Start:
    """The values that a command takes from its arguments, besides its flags.

    Attributes:
        yaml: A file with settings.
        values: Dotted names of settings -> values.
        base: The settings of the run that the command builds on.
        base_name: The file that contains `base`.
    """

    yaml: Path | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    base: Mapping[str, object] = field(default_factory=dict)
    base_name: str = ""


# ---------------------------------------------------------------------------------------------------------- arguments


def settings_file(given: Given) -> Path | None:
    """Return the YAML file that was given as an argument or as an option; None if there is none.

    Args:
        given: The parameters of the command.

    Raises:
        UsageError: Both were given.
    """
    argument, option = given.get("yaml"), given.get("config")
    if argument is not None and option is not None:
        raise UsageError(f"two files with settings were given, {argument} and --config {option}; give one")
    named = option if argument is None else argument
    return None if named is None else Path(home(str(named)))


def _from_file(given: Given) -> Start:
    return Start(settings_file(given))


def _order(given: Given) -> Start:
    """Read a task and the settings of the run in --out, or the run.yaml of a run, which names its task."""
    task = given["task"]
    again = task not in ORDER_TASKS and given["yaml"] is None and Path(task).expanduser().is_file()
    if not again and task not in ORDER_TASKS:
        raise UsageError(f"order has no task {task!r}{did_you_mean(task, ORDER_TASKS)}")
    path = settings_file({**given, "yaml": Path(task)} if again else given)
    values = {} if again else {"task": task}
    if path is not None or given["overwrite"]:
        return Start(path, values)
    from pipelines.settings.load import order_base

    return Start(path, values, *order_base(given["out"]))


def _audit(given: Given) -> Start:
    """Read the settings of the run that made the selection, without those of its model if another is trained."""
    from pipelines.settings.load import audit_base

    path = settings_file(given)
    typed = [part.partition("=") for part in given.get("set") or ()]
    named = [value.strip() for name, _, value in typed if name.strip() in ("model", "model.name")]
    return Start(path, {}, *audit_base(given["selected"], path, named[-1] if named else given["model"]))


def _explain(given: Given) -> Start:
    """Read a line of selected.jsonl, or a run and a row of its pool."""
    place, row = home(given["place"]), given["row"]
    if row is not None:
        folder = Path(place)
        folder = folder.parent if folder.name == "selected.jsonl" else folder
        name, _, number = row.rpartition(":")
        listed = number.isdecimal() and (name == "selected.jsonl" or Path(name) == folder / "selected.jsonl")
        which: dict[str, object] = {"line": int(number)} if listed else {"row": row}
        return Start(values={"file": folder / "selected.jsonl", **which})
    file, colon, line = place.rpartition(":")
    if not colon or not file or not line.isdecimal():
        raise UsageError(
            f"explain: {place!r} names no row; expected FILE:LINE, such as runs/select/selected.jsonl:17, or the "
            "folder of a run and a row of its pool"
        )
    if Path(file).name != "selected.jsonl" and not (Path(file).parent / "run.yaml").is_file():
        raise UsageError(
            f"explain: {file} is not in the folder of a run; to ask about a row of a pool, name the run too: "
            f"datatools explain DIR {place}"
        )
    return Start(values={"file": file, "line": int(line)})


def _neighbours(given: Given) -> Start:
    """The folder of a run, and a row of its pool."""
    values: dict[str, object] = {"folder": home(given["run"])}
    return Start(values=values if given["row"] is None else {**values, "row": given["row"]})


# ----------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    """A command with settings.

    Attributes:
        settings: Its settings, which define its flags, help and examples.
        entry: "module:function" of the pipeline.
        start: The function that reads its arguments.
        arguments: Its positional arguments.
        options: Its options besides those of its settings.
        talks: Whether the pipeline itself writes tables to stdout.
    """

    settings: type[Settings]
    entry: str
    start: Callable[[Given], Start] = _from_file
    arguments: tuple[inspect.Parameter, ...] = (flags.YAML,)
    options: tuple[inspect.Parameter, ...] = (flags.CONFIG, *flags.COMMON)
    talks: bool = False


_TASK = flags.argument(
    "task", str, "TASK", f"{', '.join(ORDER_TASKS[:-1])} or {ORDER_TASKS[-1]}; or the run.yaml of a run", required=True
)
_PLACE = flags.argument(
    "place", str, "FILE:LINE|DIR", "a line of selected.jsonl, or the folder of a run", required=True
)
_RUN = flags.argument("run", str, "DIR", "the folder of a run", required=True)
_ROW = flags.argument("row", str | None, "ROW", "a row of the run's pool: FILE:LINE or its id")

COMMANDS: dict[str, Command] = {
    "select": Command(SelectConfig, "pipelines.select.run:run"),
    "train": Command(TrainConfig, "pipelines.training.train:run"),
    "order": Command(OrderConfig, "pipelines.order.run:run", _order, (_TASK, flags.YAML)),
    "evaluate": Command(EvaluateConfig, "pipelines.training.evaluation:evaluate"),
    "audit": Command(AuditConfig, "pipelines.select.audit:run", _audit, talks=True),
    "diagnose": Command(DiagnoseConfig, "pipelines.diagnose.run:run"),
    "explain": Command(ExplainConfig, "pipelines.select.explain:run", _explain, (_PLACE, _ROW), (), talks=True),
    "neighbours": Command(
        NeighboursConfig, "pipelines.select.neighbours:run", _neighbours, (_RUN, _ROW), (), talks=True
    ),
    "plan": Command(PlanConfig, "pipelines.engines.plan.run:run", talks=True),
    "demo": Command(DemoConfig, "pipelines.demo:run", arguments=(), options=flags.COMMON, talks=True),
}


def register(app: typer.Typer) -> None:
    """Add all commands to an application.

    Args:
        app: The application.
    """
    for name, command in COMMANDS.items():
        parameters = [*command.arguments, *flags.of_settings(command.settings), *command.options]
        function = flags.with_parameters(lambda given, name=name: _run(name, given), parameters)
        _add(app, name, function, inspect.getdoc(command.settings) or "", command.settings.examples)
    for name, (simple, *examples) in SIMPLE.items():
        _add(app, name, simple, (inspect.getdoc(simple) or "").partition("\n\nArgs:")[0], tuple(examples))


def _add(app: typer.Typer, name: str, function: Callable[..., None], text: str, examples: tuple[str, ...]) -> None:
    shown = help.command_class(examples)
    app.command(name, cls=shown, help=text, short_help=help.first_sentence(text))(function)


def _run(name: str, given: Given) -> None:
    command = COMMANDS[name]
    start = command.start(given)
    values, nulls = values_of(command.settings, given)
    launch(
        name,
        command.settings,
        command.entry,
        start.yaml,
        {**values, **start.values},
        [*(f"{section}=null" for section in nulls), *(given.get("set") or ())],
        print_config=given.get("print_config", False),
        quiet=given.get("quiet", False),
        talks=command.talks,
        base=start.base,
        base_name=start.base_name,
    )


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of a run", show_default=False)],
) -> None:
    """Draw report.html of a run again, from the files of the run.

    Args:
        folder: The folder of the run.
    """
    from pipelines.report.pages import draw

    typer.echo(draw(Path(home(str(folder)))))


def doctor(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="folder in which runs will be written",
            rich_help_panel="Run",
            show_default="runs",
            metavar="DIR",
        ),
    ] = Path("runs"),
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="print one JSON object instead of a table", rich_help_panel="Run", show_default=False
        ),
    ] = False,
) -> None:
    """Check this machine: versions, memory, speed, disk, network settings. Exit code 4 means that a fix is needed.

    Args:
        out: The folder in which runs will be written.
        as_json: Whether to print JSON.
    """
    from pipelines.doctor import examine, show

    try:
        refuse_url(out)
    except ValueError as error:
        raise UsageError(f"--out: {error}") from None
    checks = examine(out)
    show(checks, as_json=as_json)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(4)


def ls(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="what to list", show_default=False)] = None,
) -> None:
    """List the available methods, optimizers, formats, etc. of one kind; without KIND, list the kinds.

    Args:
        kind: What to list.
    """
    from pipelines.listing import show

    show(kind)


SIMPLE: dict[str, tuple[Any, ...]] = {
    "report": (report, "datatools report runs/select"),
    "doctor": (doctor, "datatools doctor", "datatools doctor --out /scratch/runs --json"),
    "ls": (ls, "datatools ls", "datatools ls optimizers"),
}
"""Name of a command without settings -> its function, followed by examples."""
