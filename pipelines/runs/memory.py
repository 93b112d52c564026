"""Running out of memory: passes go on with smaller batches and say so; what cannot, says what to set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datatools import EnvironmentProblem, TokenBudget, is_out_of_memory
from pipelines.runs.messages import warn


def token_budget(tokens: int, label: str, setting: str = "features.token_budget") -> TokenBudget:
    """Return the padded tokens per batch of a pass, which are halved with a warning when memory does not suffice.

    Args:
        tokens: The padded tokens of a batch.
        label: What is computed, for the warning.
        setting: The setting from which the tokens come; empty if there is none.
    """
    fixed = f"; --set {setting}=N begins with N tokens" if setting else ""

    def shrunk(before: int, now: int) -> None:
        if before == tokens:  # once: further halves go without saying
            warn(
                f"{label}: a batch of at most {before:,} tokens does not fit into memory; batches now have at most "
                f"{now:,}, and are halved again where that does not suffice. Results are those of the smaller batches, "
                f"equal up to rounding{fixed}"
            )

    return TokenBudget(tokens, shrunk, "cut rows with --max-length, use --dtype bfloat16, or a device with more memory")


@contextmanager
def explained(advice: str) -> Iterator[None]:
    """Say what to do when memory does not suffice inside the `with` block.

    Args:
        advice: What was computed, and what to set.

    Raises:
        EnvironmentProblem: Memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(f"out of memory: {advice}") from error
