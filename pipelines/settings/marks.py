"""Marks of settings: what is a flag of the command line, and which settings of a run matter when it is compared.

A field is a flag when its type carries a `Flag`. A section (a field whose type is a settings model) opens some of its
fields to the command with `Flags`, so that one section serves several commands. Everything else about a flag is the
field's own: its type, its default, its help text, and whether it may be repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError, core_schema

MODEL, DATA, METHOD, TRAINING, RUN = PANELS = ("Model", "Data", "Method", "Training", "Run")
"""The headings of a command's help, in their order."""


@dataclass(frozen=True)
class Flag:
    """The flag of a field.

    Attributes:
        name: as it is typed, such as "--seed".
        panel: the heading that it stands under.
        metavar: what stands for its value; by default N for an integer, X for a number, FILE for a path, and NAME.
        default: what help shows as the default, where it is not the field's.
        off: the value that makes the section null, in commands where it may be, and `off_means` what that does.
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
        """Open the fields `names`; `default` is what help shows for them, `renamed` gives fields another flag."""
        self.names, self.default, self.renamed = names.split(), default, renamed


@dataclass(frozen=True)
class OneOf:
    """A mark of texts: one of the names that `names` gives; they are read when a value is checked."""

    names: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """A text, then the check; the error is that of a `Literal`."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        names = self.names()
        if names and value not in names:
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": _or(names)})
        return value


def _or(names: tuple[str, ...]) -> str:
    quoted = [repr(name) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


VOLATILE: dict[str, Any] = {"volatile": True}
"""How to run, not what: neither in run.yaml nor in the fingerprint."""
ELSEWHERE: dict[str, Any] = {"elsewhere": True}
"""A folder: a run may move, so it is in run.yaml and not in the fingerprint."""
LATE: dict[str, Any] = {"late": True}
"""Read only after everything expensive is computed: a finished run may be asked again with another value."""
UNSAID: dict[str, Any] = {"unsaid": True}
"""Null in almost every run, and then not in run.yaml, which older versions can still read."""
