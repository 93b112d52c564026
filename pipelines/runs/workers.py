"""The processes that share one run, as torchrun starts them. No import here loads torch."""

import os

from datatools import EnvironmentProblem, UsageError


def rank() -> int:
    """Return the number of this process among the workers: RANK as torchrun sets it, 0 for a single process.

    Raises:
        EnvironmentProblem: RANK is not a whole number.
    """
    return _whole_number("RANK", 0)


def world_size() -> int:
    """Return the number of workers: WORLD_SIZE as torchrun sets it, 1 for a single process.

    Raises:
        EnvironmentProblem: WORLD_SIZE is not a whole number.
    """
    return _whole_number("WORLD_SIZE", 1)


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
            "(`datatools train` and datatools.extract share their work among processes; this command does not)"
        )


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise EnvironmentProblem(
            f"environment variable {name} is {text!r}; expected a whole number, as torchrun sets it"
        )
    return int(text) if text else default
