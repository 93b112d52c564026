"""How a trained model is judged besides its loss: the settings that `evaluate` and `audit` share."""

import re
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from datatools import EnvironmentProblem, UsageError
from optim.unknown import did_you_mean
from pipelines.settings.base import Settings
from pipelines.settings.marks import METHOD, RUN, VOLATILE, Flag

LOSS, OPTIONS, EXACT, CODE = "loss", "options", "exact", "code"
NAMES = ("auto", LOSS, OPTIONS, EXACT, CODE)
HARNESS = "lm-eval:"
"""How the name of a task of lm-eval begins."""
RULES = ("auto", "number", "letter", "line", "last-line", "whole")
"""How an answer is taken from what a model writes; the names of `pipelines.training.accuracy.extract`."""
REGEX = "regex:"


def _metric(name: str) -> str:
    if name in NAMES or (name.startswith(HARNESS) and name != HARNESS):
        return name
    known = (*NAMES, f"{HARNESS}TASK")
    raise ValueError(f"there is no metric {name!r}{did_you_mean(name, known)}; expected {', '.join(known)}")


class MetricsConfig(Settings):
    """What is measured on held-out rows besides their loss."""

    shorthand = "names"
    names: Annotated[
        list[Annotated[str, Field(max_length=256), AfterValidator(_metric)]],
        Field(min_length=1, max_length=16),
        Flag("--metric", METHOD, "NAMES"),
    ] = Field(
        default=["auto"],
        description="options ranks the options of a row by their likelihood, exact compares generated answers, code "
        "runs the row's tests on generated code, lm-eval:TASK runs a task of lm-eval, loss is nothing more; auto is an "
        "accuracy where the rows offer one",
    )
    options_length: Literal["sum", "mean"] = Field(
        default="sum",
        description="score of an option: the sum of the log-probabilities of its tokens, or their mean, which does not "
        "count the length",
    )
    extract: Annotated[str, Field(max_length=1000), Flag("--extract", METHOD, "RULE")] = Field(
        default="auto",
        description="how an answer is taken from generated text: number (after the last '####', else the last one), "
        "letter (of an option), line (the first), last-line, whole, or regex:PATTERN (its first group); auto takes "
        "for each row a rule that finds the gold answer in the row's own answer",
    )
    max_new_tokens: Annotated[int | None, Flag("--max-new-tokens", METHOD)] = Field(
        default=None,
        ge=1,
        le=2**16,
        description="longest generated answer in tokens; null is a quarter more than the longest answer of the rows",
    )
    generate_rows: int | None = Field(
        default=None, ge=1, le=10**7, description="generate for this many rows only, drawn by the seed 0; null is all"
    )
    generate_tokens: int = Field(
        default=8192, ge=1, le=2**24, description="tokens per batch of generation, answers included; limits memory"
    )
    allow_code_execution: Annotated[bool, Flag("--allow-code-execution", RUN)] = Field(
        default=False,
        description="run generated code on the row's tests, in a process without network, other processes and writing "
        "access to files; only this flag, given with every command, can allow it",
        json_schema_extra=VOLATILE,
    )
    code_seconds: float = Field(default=10.0, gt=0, le=3600, description="time limit for the tests of one row")
    code_megabytes: int = Field(default=1024, ge=64, le=2**20, description="memory limit for the tests of one row")

    @field_validator("extract")
    @classmethod
    def _rule(cls, value: str) -> str:
        if value.startswith(REGEX):
            try:
                re.compile(value.removeprefix(REGEX))
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}") from error
        elif value not in RULES:
            known = (*RULES, f"{REGEX}PATTERN")
            raise ValueError(f"there is no rule {value!r}{did_you_mean(value, known)}; expected {', '.join(known)}")
        return value


def check(config: MetricsConfig) -> None:
    """Refuse metrics that cannot be measured here, before a model is loaded.

    Args:
        config: The settings.

    Raises:
        UsageError: Code would run, and nothing allows it.
        EnvironmentProblem: lm-eval is not installed; names the extra that brings it.
    """
    if CODE in config.names and not config.allow_code_execution:
        raise UsageError(
            "--metric code: runs code that the model writes, which needs --allow-code-execution on this command line; "
            "the code gets no network, no other processes and no writing access, but nothing is safe for certain"
        )
    tasks = [name for name in config.names if name.startswith(HARNESS)]
    if tasks and find_spec("lm_eval") is None:
        raise EnvironmentProblem(
            f"--metric {tasks[0]}: the package lm-eval is not installed; install the extra that brings it: "
            "pip install 'datatools-llm[lm-eval]'"
        )
