"""Flags are what the fields of the settings say; a setting with a flag is added with one line."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field, ValidationError
from typer.testing import CliRunner

from pipelines.cli import flags as options
from pipelines.cli.commands import COMMANDS
from pipelines.settings import reference
from pipelines.settings.base import FilePath, Names, Settings
from pipelines.settings.flags import flag_for, flags_of, values_of
from pipelines.settings.load import all_names
from pipelines.settings.marks import DATA, METHOD, MODEL, Flag, Flags, OneOf


class Section(Settings):
    """A part that commands share."""

    shorthand = "name"
    name: Annotated[str, Flag("--part", MODEL)] = Field(default="x", description="a name")
    rank: Annotated[int, Flag("--rank", MODEL, off=0, off_means="is none")] = Field(default=8, description="a rank")
    hidden: int = Field(default=1, description="no flag")


class Special(Section):
    """A part whose default differs, and whose flag is the same."""

    rank: int = Field(default=2, description="another rank")


class Command(Settings):
    """A command with a flag of every kind."""

    first: Annotated[Section, Flags("name rank")] = Field(description="the first part")
    second: Annotated[Special | None, Flags("name rank", default="as before", name="--other", rank="--other-rank")] = (
        Field(default=None, description="the second part")
    )
    files: Annotated[Names, Flag("--files", DATA, "FILE")] = Field(default=[], description="files")
    kinds: Annotated[list[Literal["a", "b"]], Flag("--kinds", METHOD)] = Field(default=["a"], description="kinds")
    way: Annotated[str, OneOf(lambda: ("left", "right")), Flag("--way", METHOD)] = Field(
        default="left", description="a way"
    )
    where: Annotated[FilePath | None, Flag("--where", DATA)] = Field(default=None, description="a file; null is none")
    share: Annotated[float, Flag("--share", METHOD)] = Field(default=0.0, description="a share")
    loud: Annotated[bool, Flag("--loud", METHOD)] = Field(default=False, description="say more")


def test_what_the_fields_say():
    found = {setting.flag.name: setting for setting in flags_of(Command)}
    assert list(found) == ["--part", "--rank", "--other", "--other-rank", "--files", "--where", "--kinds", "--way",
                           "--share", "--loud"]  # fmt: skip
    assert [found[name].default for name in found] == ["x", "8", "as before", "as before", "", "", "a", "left", "0.0",
                                                       ""]  # fmt: skip
    assert found["--part"].help == "the first part: a name" and found["--other-rank"].help == "another rank; 0 is none"
    assert found["--files"].repeats and found["--kinds"].listed and found["--way"].choices == ("left", "right")
    kinds = {found[name].kind for name in ("--where", "--share", "--loud", "--rank", "--way")}
    assert kinds == {Path, float, bool, int, str}
    assert flag_for(Command, "second") == "--other" and flag_for(Command, "first.hidden") == ""


def test_what_is_typed_becomes_settings(tmp_path):
    seen = []
    app = typer.Typer()
    app.command()(options.with_parameters(seen.append, options.of_settings(Command)))
    typed = "--part y --files a,1 --files b --kinds a,b --other-rank 0 --loud --where w"
    result = CliRunner().invoke(app, typed.split())
    assert result.exit_code == 0, result.output
    values, nulls = values_of(Command, seen[0])
    assert nulls == ["second"]
    assert {name: value for name, value in values.items() if value is not None} == {
        "first.name": "y",
        "files": ["a,1", "b"],
        "kinds": ["a", "b"],
        "loud": True,
        "where": "w",
    }
    text = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "kinds: a, b; comma-separated" in text and "a way; one of left, right" in text
    assert "files; may be repeated" in text and "a file; by default none" in text


def test_a_name_that_is_not_known_is_refused():
    with pytest.raises(ValidationError, match="'left' or 'right'"):
        Command(first="y", way="up")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_of_settings_has_every_setting(command):
    model = COMMANDS[command].settings
    rows = reference.rows(model)
    assert [name for name, *_ in rows] == all_names(model) and all(meaning for *_, meaning in rows)
    flags = {path: setting.flag.name for setting in flags_of(model) for path in setting.paths}
    assert {name: flag for name, flag, *_ in rows if flag} == flags
