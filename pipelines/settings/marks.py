"""Marks of settings: which settings are flags, and which settings matter when runs are compared.

A field is a flag if its type has a `Flag`. A section (a field whose type is a settings model) makes some of its fields
flags of the command with `Flags`, so that one section serves several commands. Everything else about a flag comes from
the field: its type, its default, its help text, and whether it may be repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError, core_schema

MODEL, DATA, METHOD, TRAINING, RUN = PANELS = ("Model", "Data", "Method", "Training", "Run")
"""The headings in the help of a command, in order."""


@dataclass(frozen=True)
class Flag:
    """The flag of a field.

    Attributes:
        name: The flag as it is typed, such as "--seed".
        panel: The heading of help under which it is listed.
        metavar: The name of its value; by default N for an integer, X for a number, FILE for a path, else NAME.
        default: The default that help shows, if it is not the field's.
        off: The value that sets the section to null, in commands where it may be null.
        off_means: What the value `off` does.
    """

    name: str
    panel: str
    metavar: str = ""
    default: str = ""
    off: int | None = None
    off_means: str = ""


class Flags:
    """The fields of a section that are flags of the command."""

    def __init__(self, names: str, default: str = "", **renamed: str) -> None:
        """Make fields of a section flags of the command.

        Args:
            names: The names of the fields, separated by spaces.
            default: The default that help shows for them.
            **renamed: Field -> another flag.
        """
        self.names, self.default, self.renamed = names.split(), default, renamed


@dataclass(frozen=True)
class OneOf:
    """A mark of texts: the value must be one of the names that `names` returns when a value is checked."""

    names: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of a text, followed by the check. The error is that of a `Literal`."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str | None) -> str | None:
        names = self.names()
        if names and value is not None and value not in names:
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": _or(names)})
        return value


def _or(names: tuple[str, ...]) -> str:
    quoted = [repr(name) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


VOLATILE: dict[str, Any] = {"volatile": True}
"""A setting of how to run, not of what: neither in run.yaml nor in the fingerprint."""
ELSEWHERE: dict[str, Any] = {"elsewhere": True}
"""A folder: because a run may move, it is in run.yaml and not in the fingerprint."""
LATE: dict[str, Any] = {"late": True}
"""A setting that is read after all expensive computations: a finished run may be repeated with another value."""
UNSAID: dict[str, Any] = {"unsaid": True}
"""A setting that is null in most runs and then not in run.yaml, so that older versions can read the file."""
