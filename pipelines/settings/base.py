"""The foundation of all settings: the base class, the types of their values, and the marks of their fields.

The settings of each command are pydantic models in the file of its name. They are kept here, apart from the code that
they configure, because checks before a run, run folders and the command line read the settings of several commands,
and because no import here may load torch: `--help` and `--print-config` must be fast.
"""

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipelines.settings.marks import ELSEWHERE, RUN, VOLATILE, Flag

Json = bool | int | float | str | None | list["Json"] | dict[str, "Json"]


def home(text: str) -> str:
    """Return a path as it was typed, with `~` expanded.

    Args:
        text: The path.

    Raises:
        ValueError: The path contains a character that no file name can have.
    """
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{text!r} contains a character that no file name can have")
    return str(Path(text).expanduser()) if text.startswith("~") else text


_URL = re.compile(r"([a-z][a-z0-9+.-]+):(//?)", re.IGNORECASE)


def refuse_url(path: str | Path) -> Path:
    """Return a path that names a folder or a file; refuse a URL, which would become a folder called "s3:".

    A `Path` has lost the second slash of a URL, so that `ab:/c` may be a folder called "ab:". It counts as a URL if
    fsspec knows its scheme.

    Args:
        path: The path, best as it was typed.

    Raises:
        ValueError: It is a URL.
    """
    found = _URL.match(str(path))
    if found is None or (found[2] == "/" and not (isinstance(path, Path) and _is_scheme(found[1]))):
        return Path(path)
    rest = str(path)[found.end() :].lstrip("/")
    if found[1].lower() == "file":
        raise ValueError(f"file://{rest} is a URL; give the path itself: /{rest.removeprefix('localhost/')}")
    raise ValueError(
        f"{found[1]}://{rest} is a URL, and this has to be a folder or a file on a disk: a run needs locks and atomic "
        "renames, which object stores do not have; use a disk that all its processes share, and copy finished runs to "
        "the store"
    )


def _is_scheme(name: str) -> bool:
    from fsspec.registry import known_implementations

    return name.lower() in known_implementations


def _home_path(path: Path) -> Path:
    return Path(home(str(path)))


def _not_a_url(value: object) -> object:
    return refuse_url(value) if isinstance(value, str | Path) else value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _columns(value: object) -> object:
    """Read 'a=b,c=d' as {a: b, c: d}, and a list of such texts as one mapping."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    wrong = next((name for name, equals, theirs in pairs if not (equals and name.strip() and theirs.strip())), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} names no column; expected OURS=YOURS, such as prompt=question,completion=answer")
    return {name.strip(): theirs.strip() for name, _, theirs in pairs}


Columns = Annotated[dict[str, str | dict[str, str]], BeforeValidator(_columns)]
Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(home)]
Names = Annotated[list[Name], BeforeValidator(_listed), Field(max_length=10_000)]
FilePath = Annotated[Path, BeforeValidator(_not_a_url), AfterValidator(_home_path)]
Paths = Annotated[list[FilePath], BeforeValidator(_listed)]
BudgetText = Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1, max_length=64)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Scalar = bool | int | float | str | None
Options = dict[str, Scalar | list[Scalar]]


class Settings(BaseModel):
    """The base of all settings: unknown names are refused, values are immutable, and numbers are finite.

    `shorthand` names the field that a plain text (or list) sets: `model: NAME` means `model: {name: NAME}`. For the
    settings of a command, the docstring is the command's help, and `examples` are the commands at the end of the help.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        defer_build=True,
    )
    shorthand: ClassVar[str | None] = None
    examples: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return cls.expand(value)

    @classmethod
    def expand(cls, value: object) -> object:
        """Return the mapping that a shorthand means; any other value is returned unchanged.

        Args:
            value: The value of a section.
        """
        if cls.shorthand is not None and isinstance(value, str | list | Path):
            return {cls.shorthand: value}
        return value


class RunSettings(Settings):
    """The settings of every command that has a run folder."""

    out: Annotated[FilePath, Flag("--out", RUN, "DIR")] = Field(
        description="folder of the run; an interrupted run in it is continued", json_schema_extra=ELSEWHERE
    )
    seed: Annotated[Seed, Flag("--seed", RUN)] = Field(
        default=0, description="the seed from which all other seeds are derived"
    )
    overwrite: Annotated[bool, Flag("--overwrite", RUN)] = Field(
        default=False, description="move an existing run aside to OUT.old-N", json_schema_extra=VOLATILE
    )
    dry_run: Annotated[bool, Flag("--dry-run", RUN)] = Field(
        default=False,
        description="check that everything loads, show the expected cost of the run, and stop",
        json_schema_extra=VOLATILE,
    )
    accept_change: Annotated[Names, Flag("--accept-change", RUN)] = Field(
        default=[],
        description="continue the run although this has changed since it began: code, data, model, ...",
        json_schema_extra=VOLATILE,
    )
