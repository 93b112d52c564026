"""The command line: thin, quick to answer, with errors in one line and exit codes that mean something."""

import importlib
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import typer

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.cli import app as cli
from pipelines.cli.app import main
from pipelines.cli.commands import COMMANDS, SIMPLE
from pipelines.settings.audit import AuditConfig
from pipelines.settings.demo import DemoConfig
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.explain import ExplainConfig, NeighboursConfig
from pipelines.settings.flags import flags_of
from pipelines.settings.load import all_names, load_config
from pipelines.settings.order import OrderConfig
from pipelines.settings.plan import PlanConfig
from pipelines.settings.select import SelectConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from tests.processes import spawn

REPOSITORY = Path(__file__).resolve().parents[3]
NAMES = [*COMMANDS, *SIMPLE]
ENTRIES = {
    "select.run:run": SelectConfig,
    "training.train:run": TrainConfig,
    "select.audit:run": AuditConfig,
    "select.explain:run": ExplainConfig,
    "select.neighbours:run": NeighboursConfig,
    "demo:run": DemoConfig,
    "engines.plan.run:run": PlanConfig,
    "training.evaluation:evaluate": EvaluateConfig,
}
"""The function that each command runs -> the settings that it takes."""
SELECT = ["select", "--model", "m", "--train", "a.jsonl", "--target", "d.jsonl"]


@pytest.fixture(autouse=True)
def quiet_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the files that are named here are not there, and the pipelines are not run: see test_preflight
    monkeypatch.setattr("pipelines.rows.preflight.check", lambda config, command: None)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def pipeline(monkeypatch):
    """Put a function in the place of a pipeline module; the configurations that it got are in the list."""

    def install(entry, function=lambda config: None):
        name, _, attribute = entry.partition(":")
        got = []

        def run(config):
            got.append(config)
            return function(config)

        module = types.ModuleType(name)
        setattr(module, attribute, run)
        monkeypatch.setitem(sys.modules, name, module)
        return got

    return install


def launch(*arguments, code="from pipelines.cli.app import main; import sys; sys.exit(main())", **environment):
    return spawn(code, *arguments, **environment)


# ---------------------------------------------------------------------------------------------------------- help


def test_help_and_config_import_nothing_heavy(tmp_path):
    """One process, every command's help and --print-config: torch, transformers and pandas stay away."""
    code = f"""
        import sys
        from pipelines.cli.app import main
        for command in {NAMES}:
            assert main([command, "--help"]) == 0
        assert not {{"pipelines.settings.load", "pipelines.runs.folder"}} & set(sys.modules), "help needs fields alone"
        assert main({[*SELECT, "--print-config"]}) == 0
        assert main(["select", "--nonsense"]) == 2
        assert main(["ls"]) == 0 and main(["ls", "methods"]) == 0
        heavy = {{"torch", "transformers", "pandas", "numpy", "pyarrow", "sklearn", "peft"}} & set(sys.modules)
        sys.exit(f"imported {{heavy}}" if heavy else 0)
    """
    process = launch(code=code)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.count("Usage: datatools") == len(NAMES)


@pytest.mark.parametrize("arguments", [["--help"], ["select", "--help"]])
def test_help_imports_little(arguments):
    """Help answers within 0.5 s because it imports little; `make bench` times it, because a test of time fails on a
    busy machine. 441 modules are imported today, and 130 of them are those of typer, rich and pydantic;
    torch alone brings 1,500.
    """
    code = f"""
        import sys
        from pipelines.cli.app import main
        assert main({arguments}) == 0
        print("modules:", len(sys.modules))
    """
    process = launch(code=code)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "Usage: datatools" in out, error
    assert int(out.rpartition("modules:")[2]) < 550


@pytest.mark.parametrize("command", NAMES)
def test_help_has_examples_that_parse(command, capsys, pipeline):
    """Each example of the help is a command that is accepted as far as its settings (files are not there)."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    block = text.partition("Examples:\n")[2].replace("\\\n", " ")
    examples = [shlex.split(line) for line in block.splitlines() if line.strip()]
    assert examples and all(words[0] == "datatools" and words[1] in (command, "train") for words in examples)
    for entry in ENTRIES:
        pipeline(f"pipelines.{entry}")
    if command in ("select", "train", "evaluate", "audit", "explain", "neighbours", "demo"):
        for words in examples:
            code = main(words[1:])
            error = capsys.readouterr().err
            needs_a_file = any(word.endswith(".yaml") for word in words) or command == "audit"
            assert code == 0 or (
                needs_a_file and ("cannot be read" in error or "AuditConfig needs 'model'" in error)
            ), error


@pytest.mark.parametrize("columns", [60, 80])
def test_help_fits_and_its_commands_can_be_pasted(columns, capsys, monkeypatch):
    """No line is wider than the terminal, and no command is broken but by a backslash with nothing behind it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in [[], *([name] for name in NAMES)]:
        assert main([*command, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns, command
        prose, _, examples = text.partition("Examples:\n")
        assert all(line.count("`") % 2 == 0 for line in prose.splitlines()), command
        if columns == 80:  # in a table
            listed = len(re.findall(r"datatools ls [a-z]{6,}", prose)) + (command == ["ls"])
            assert prose.count("datatools ls") == listed, command
        whole = [line for line in examples.replace("\\\n", "").splitlines() if line]
        assert all(line.startswith("  datatools ") and line == line.rstrip("\\ ") for line in whole), command
        assert bool(command) == bool(whole)


def test_paths_of_suggested_commands_may_begin_with_a_tilde(monkeypatch, tmp_path, capsys):
    """What is printed has `~` for the home folder, in quotes that a shell does not open."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("model: m\ndata: a.jsonl\n")
    assert main(["train", "~/run.yaml", "--print-config"]) == 0
    assert main(["report", "~/nowhere"]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_those_of_the_settings(command):
    """A command has the flags that its settings state, each of a setting that is there, and four options besides."""
    parameters = typer.main.get_command(cli.app).commands[command].params
    options = {name for parameter in parameters for name in parameter.opts if name.startswith("--")}
    stated = {setting.flag.name: setting for setting in flags_of(COMMANDS[command].settings)}
    assert set(stated) <= options <= set(stated) | {"--config", "--set", "--print-config", "--quiet"}
    names = all_names(COMMANDS[command].settings)
    assert all(setting.help and set(setting.paths) <= set(names) for setting in stated.values())


@pytest.mark.parametrize(
    "model, flag, default",
    [
        (SelectConfig, "--epochs", "4"),
        (SelectConfig, "--lora-rank", "8"),
        (TrainConfig, "--epochs", "3"),
        (TrainConfig, "--weight-decay", "0.0"),
        (TrainConfig, "--keep", ""),
        (OrderConfig, "--on-bad-row", "skip"),
        (OrderConfig, "--estimators", "pairwise,reduced"),
        (OrderConfig, "--lora-rank", "0"),
        (AuditConfig, "--learning-rate", "as in the run"),
        (DiagnoseConfig, "--checks", "all"),
    ],
)
def test_defaults_are_those_of_the_command(model, flag, default):
    assert next(setting.default for setting in flags_of(model) if setting.flag.name == flag) == default


# ------------------------------------------------------------------------------------------------- flags to config


def test_every_flag_of_select_reaches_its_setting(pipeline):
    got = pipeline("pipelines.select.run:run")
    code = main(
        [
            *SELECT,
            "--train",
            "b.jsonl",
            "--budget",
            "500",
            "--out",
            "o",
            "--seed",
            "3",
            "--method",
            "less",
            "--on-bad-row",
            "skip",
            "--dedup",
            "near",
            "--max-per-source",
            "0.3",
            "--checkpoints",
            "c1",
            "--checkpoints",
            "c2",
            "--adam-mode",
            "code",
            "--projector",
            "rademacher",
            "--dim",
            "64",
            "--chat-template",
            "tulu",
            "--max-length",
            "99",
            "--lora-rank",
            "4",
            "--optimizer",
            "muon",
            "--learning-rate",
            "0.1",
            "--epochs",
            "2",
            "--batch-size",
            "5",
            "--set",
            "features.dtype=int8",
            "--overwrite",
            "--accept-change",
            "data",
            "--dry-run",
        ]
    )
    assert code == 0
    config = got[0]
    want = SelectConfig(
        model={"name": "m", "chat": "tulu", "max_length": 99},
        train={"paths": ["a.jsonl", "b.jsonl"], "on_bad_row": "skip", "dedup": "near"},
        target=["d.jsonl"],
        budget="500",
        method="less",
        out="o",
        seed=3,
        max_per_source=0.3,
        checkpoints=["c1", "c2"],
        features={"adam_mode": "code", "dtype": "int8"},
        projector={"name": "rademacher", "dim": 64},
        lora={"rank": 4},
        warmup={"optimizer": "muon", "learning_rate": 0.1, "epochs": 2, "batch_size": 5},
        overwrite=True,
        accept_change=["data"],
        dry_run=True,
    )
    assert config == want


def test_train_audit_evaluate_explain_demo(pipeline, capsys, tmp_path):
    got = pipeline("pipelines.training.train:run", lambda config: config.out)
    assert main(["train", "--model", "M", "--data", "F", "--optimizer", "lion", "--out", "o", "--lora-rank", "0"]) == 0
    assert got[0].lora is None and got[0].training.optimizer == "lion" and capsys.readouterr().out == "o\n"

    got = pipeline("pipelines.select.audit:run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text("model: M\ntrain: p.jsonl\ntarget: d.jsonl\nwarmup: {learning_rate: 0.5}\n")
    command = [
        "audit",
        "--selected",
        "run/selected.jsonl",
        "--pool",
        "F",
        "--test",
        "T",
        "--seeds",
        "3",
        "--against",
        "random,random-length, tfidf,rds",
    ]
    assert main(command) == 0
    assert got[0].against == ["random", "random-length", "tfidf", "rds"] and got[0].seeds == 3
    assert got[0].model.name == "M" and got[0].training.learning_rate == 0.5 and got[0].out == Path("run/audit")

    got = pipeline("pipelines.training.evaluation:evaluate", lambda config: {"loss": 1.5, "tokens": 10})
    assert main(["evaluate", "--model", "M", "--adapter", "A", "--data", "F"]) == 0
    assert got[0].model.adapter == Path("A") and json.loads(capsys.readouterr().out) == {"loss": 1.5, "tokens": 10}

    got = pipeline("pipelines.select.explain:run", lambda config: {"not": "printed"})
    assert main(["explain", "a:b/selected.jsonl:17"]) == 0
    assert (got[0].file, got[0].line) == (Path("a:b/selected.jsonl"), 17) and capsys.readouterr().out == ""

    got = pipeline("pipelines.demo:run")
    assert main(["demo", "--set", "seeds=0"]) == 0 and got[0].seeds == 0


def test_evaluate_keeps_stdout_clean(pipeline, capsys):
    def noisy(config):
        print("a library says hello")
        return {"loss": 2.0, "tokens": 1}

    pipeline("pipelines.training.evaluation:evaluate", noisy)
    assert main(["evaluate", "--model", "M", "--data", "F", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == '{"loss": 2.0, "tokens": 1}\n' and "library" in captured.err


def test_print_config_replays(pipeline, capsys, tmp_path):
    assert main([*SELECT, "--dim", "64", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "# how much to select" in text
    (tmp_path / "s.yaml").write_text(text)
    got = pipeline("pipelines.select.run:run")
    assert main(["select", "s.yaml"]) == 0 and main(["select", "--config", "s.yaml", "--seed", "5"]) == 0
    assert got[0] == load_config(SelectConfig, tmp_path / "s.yaml") and got[0].projector.dim == 64 and got[1].seed == 5


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, want",
    [
        (["select"], "SelectConfig needs 'model'"),
        (["select", "--modle", "m"], "No such option: --modle"),
        (["select", "--dim", "abc"], "you gave 'abc'"),
        (["selct"], "selct"),
        ([*SELECT, "--set", "fracton=1"], "did you mean 'warmup.fraction'?"),
        ([*SELECT, "--method", "les"], "did you mean 'less'?"),
        (["select", "missing.yaml"], "missing.yaml: cannot be read"),
        (["select", "a.yaml", "--config", "b.yaml"], "two files with settings"),
        (["explain", "selected.jsonl"], "expected FILE:LINE"),
        (["explain", "selected.jsonl:0"], "greater than or equal to 1"),
        (["ls", "optimisers"], "did you mean 'optimizers'?"),
        (
            ["audit", "--against", "randm", "--selected", "s", "--pool", "p", "--test", "t", "--model", "m"],
            "did you mean 'random",
        ),
    ],
)
def test_usage_errors_are_one_line_and_2(arguments, want, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert want in captured.err


@pytest.mark.parametrize(
    "error, code",
    [
        (UsageError("u"), 2),
        (DataError("d"), 3),
        (EnvironmentProblem("e"), 4),
        (OSError(28, "No space left on device", "f"), 4),
        (PermissionError(13, "Permission denied", "f"), 4),
        (OSError(36, "File name too long", "n" * 300), 3),
        (OSError(40, "Too many levels of symbolic links", "f"), 3),
        (OSError(116, "Stale file handle", "f"), 4),
        (MemoryError(), 4),
    ],
)
def test_exit_codes(pipeline, capsys, error, code):
    def fail(config):
        raise error

    pipeline("pipelines.select.run:run", fail)
    assert main(SELECT) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


def test_an_error_does_not_repeat_a_password(capsys, tmp_path):
    """What is typed is shown in the logs of other machines."""
    out = ["--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "run")]
    assert main(["train", "--model", "https://user:hunter2@example.org/x", *out]) == 2
    text = capsys.readouterr().err
    assert "hunter2" not in text and "error: --model https://***@example.org/x" in text


def test_a_bug_keeps_its_traceback(pipeline, capsys):
    def fail(config):
        raise RuntimeError("the bug")

    pipeline("pipelines.select.run:run", fail)
    assert main(SELECT) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "the bug" in text and "Please report it" in text


def test_errors_cannot_command_the_terminal(pipeline, capsys):
    def fail(config):
        raise DataError("row \x1b[2J\u202e is bad")

    pipeline("pipelines.select.run:run", fail)
    assert main(SELECT) == 3
    assert not set(capsys.readouterr().err) & {"\x1b", "\u202e"}


def test_the_bare_command_shows_what_there_is(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "doctor" in captured.out + captured.err and "Traceback" not in captured.err
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("datatools")


def test_python_m_pipelines():
    process = subprocess.run(
        [sys.executable, "-m", "pipelines", "--help"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert process.returncode == 0 and "Usage: datatools" in process.stdout


# ------------------------------------------------------------------------------------------------------- interrupts

_SLOW = """
    import sys, time, types
    from pipelines.runs.folder import Run

    def run(config):
        with Run(config.out, config, "select"):
            print("ready", file=sys.stderr, flush=True)
            time.sleep(60)

    module = types.ModuleType("pipelines.select.run")
    module.run = run
    sys.modules["pipelines.select.run"] = module
    from pipelines.cli.app import main
    sys.exit(main())
"""


@pytest.mark.parametrize(
    "number, code, times",
    [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 2)],
)
def test_interrupts_end_cleanly_and_say_how_to_go_on(tmp_path, number, code, times):
    for name in ("a.jsonl", "d.jsonl"):
        (tmp_path / name).touch()
    process = launch(*SELECT, "--out", "o", code=_SLOW)
    assert process.stderr is not None
    while "ready" not in process.stderr.readline():
        assert process.poll() is None
    start = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == code and time.monotonic() - start < 10
    assert "Traceback" not in error and out == ""
    assert (
        "interrupted: finished work is kept in o; to continue, run the same command again: datatools select --model m"
        in error
    )
    assert json.loads((tmp_path / "o/progress.json").read_text())["state"] == "interrupted"
    assert not (tmp_path / "o/.lock").exists()


# ------------------------------------------------------------------------------------- the real modules, as they are


@pytest.mark.parametrize("entry, model", ENTRIES.items())
def test_pipelines_take_their_configuration(entry, model):
    name, _, attribute = entry.partition(":")
    function = getattr(importlib.import_module(f"pipelines.{name}"), attribute)
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    assert parameters[0].annotation is model and all(p.default is not p.empty for p in parameters[1:])
