"""Errors advise flags that exist, and that the command which failed has."""

import ast
import re
from pathlib import Path

import pytest

from pipelines.cli.advice import fitting
from pipelines.cli.app import flags_of_commands, main
from pipelines.cli.commands import COMMANDS
from pipelines.settings.load import all_names

PACKAGES = Path(__file__).resolve().parents[3]
# flags of other tools
OTHERS = {"--no-deps", "--nproc-per-node", "--input", "--output", "--help", "--version", "--rates", "--head"}
FLAGS = flags_of_commands()


def told() -> list[tuple[str, str]]:
    """(file, flag) of every flag that a text of the packages names."""
    found = []
    for package in ("pipelines", "datatools", "optim"):
        for path in sorted((PACKAGES / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found += [(path.name, flag) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value)]
    return found


def test_every_flag_that_is_named_exists():
    every = set().union(*FLAGS.values()) | OTHERS
    assert len(told()) > 200
    assert sorted({(file, flag) for file, flag in told() if flag not in every}) == []


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_a_flag_of_another_command_comes_with_what_stands_in_its_place(command):
    for flag in sorted(set().union(*FLAGS.values())):
        text = f"row 3 is bad; use {flag} this"
        said = fitting(text, command, FLAGS)
        assert said.startswith(text) and (said == text) == (flag in FLAGS[command])
        for other in re.findall(r"--set ([\w.]+)=", said.removeprefix(text)):
            assert "--set" in FLAGS[command] and other in all_names(COMMANDS[command].settings)
    assert fitting("use `datatools train --order x`", command, FLAGS) == "use `datatools train --order x`"
    assert fitting("run pip install --no-deps x", command, FLAGS) == "run pip install --no-deps x"


def test_an_audit_of_bad_rows_names_its_own_settings(tmp_path, world, capsys):
    (tmp_path / "bad.jsonl").write_text("{\n")
    argv = ["audit", "--model", world.model, "--pool", tmp_path / "bad.jsonl", "--test", world.test,
            "--selected", world.pool, "--out", tmp_path / "out"]  # fmt: skip
    assert main([str(part) for part in argv]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--set pool.on_bad_row=... or --set test.on_bad_row=..." in said


def test_a_bad_target_row_is_not_advised_to_be_skipped(tmp_path, world, capsys):
    (tmp_path / "bad.jsonl").write_text("{\n")
    argv = ["select", "--model", world.model, "--train", world.pool, "--target", tmp_path / "bad.jsonl",
            "--out", tmp_path / "out"]  # fmt: skip
    assert main([str(part) for part in argv]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert "remove them from the file" in said and "--on-bad-row" not in said
