"""The processes that share one run. No import here loads torch.

There are two kinds. Processes that torchrun starts for `datatools train` compute each step together: RANK 0 leads them.
The members of a team (`pipelines.engines`) share out units of work, and any of them may lead: the one that holds the
lock of the run folder.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from datatools import EnvironmentProblem, UsageError


@dataclass(frozen=True)
class Member:
    """This process as a member of a team.

    Attributes:
        name: Its name in receipts and messages.
        place: Its position among the members, from which it begins to look for work.
        size: The expected number of members.
        leads: Whether it leads the run: it alone writes the run's records and prints.
    """

    name: str
    place: int
    size: int
    leads: bool


_member: Member | None = None


def member() -> Member | None:
    """Return this process as a member of a team; None if it works by itself."""
    return _member


@contextmanager
def acting_as(one: Member) -> Iterator[None]:
    """Make this process a member of a team inside the `with` block.

    Args:
        one: The member.
    """
    global _member
    before, _member = _member, one
    try:
        yield
    finally:
        _member = before


def leads() -> bool:
    """Return whether this process writes the records of its run and prints."""
    return rank() == 0 and (_member is None or _member.leads)


def helps() -> bool:
    """Return whether this process is a member of a team that another process leads."""
    return _member is not None and not _member.leads


def rank() -> int:
    """Return the number of this process among the workers: RANK as torchrun sets it, 0 for a single process.

    Raises:
        EnvironmentProblem: RANK is not a whole number.
    """
    return whole_number("RANK", 0)


def world_size() -> int:
    """Return the number of workers: WORLD_SIZE as torchrun sets it, 1 for a single process.

    Raises:
        EnvironmentProblem: WORLD_SIZE is not a whole number.
    """
    return whole_number("WORLD_SIZE", 1)


def alone(command: str) -> None:
    """Refuse to run a command as several processes.

    Args:
        command: The command as the user typed it, for the message.

    Raises:
        UsageError: WORLD_SIZE is above 1.
    """
    if world_size() > 1:
        raise UsageError(
            f"{command} runs as one process, but WORLD_SIZE is {world_size()}; start it without torchrun "
            "(`datatools train`, `select` and `audit` share their work among processes; this command does not)"
        )


def whole_number(name: str, default: int) -> int:
    """Return the number in an environment variable.

    Args:
        name: The name of the variable.
        default: The value if it is not set.

    Raises:
        EnvironmentProblem: It is not a whole number.
    """
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise EnvironmentProblem(
            f"environment variable {name} is {text!r}; expected a whole number, as torchrun sets it"
        )
    return int(text) if text else default
