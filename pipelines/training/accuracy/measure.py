"""What is measured besides the loss: chosen once for the held-out rows, then measured on any number of models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datatools import DataError, files
from pipelines.models.limits import ModelLimits
from pipelines.rows.rows import Rows
from pipelines.runs.progress import progress
from pipelines.settings.metrics import CODE, EXACT, HARNESS, LOSS, OPTIONS, MetricsConfig, check
from pipelines.texts import plural
from pipelines.training.accuracy import harness, options, sandbox
from pipelines.training.accuracy.extract import after_reasoning, equal, extract, rule_for
from pipelines.training.accuracy.questions import Question, questions
from pipelines.training.accuracy.written import Writer

LABELS = {OPTIONS: "option accuracy", EXACT: "exact match", CODE: "tests passed"}
"""Metric -> what tables call it; a task of lm-eval has its own name."""
Keep = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""(name, how it is made) -> the result of that name, kept from an earlier attempt or made."""
_SHORT = 64  # characters of a gold answer that generation may be compared with
_FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Measured:
    """One metric of one model.

    Attributes:
        rows: the held-out rows, as their numbers in the pool; of a task of lm-eval, counted from 0.
        values: float64 [n], 1 where the answer is right.
        more: further means, such as the mean probability of the right option.
        answers: what the model said, row by row, for people.
    """

    rows: Sequence[int]
    values: NDArray[np.float64]
    more: Mapping[str, float] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()

    @property
    def accuracy(self) -> float:
        """The mean of the values."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Plan:
    """What is measured, on which rows.

    Attributes:
        config: the settings.
        metrics: names of metrics, without the loss.
        rows: the held-out rows.
        asked: the questions that they hold.
        said: what was chosen and why, in sentences.
        tokenizer: the tokenizer of the models.
        limits: how many tokens they take.
    """

    config: MetricsConfig
    metrics: tuple[str, ...]
    rows: Rows
    asked: Sequence[Question]
    said: list[str]
    tokenizer: Any
    limits: ModelLimits

    @cached_property
    def ranked(self) -> list[Question]:
        """The questions with options."""
        return [one for one in self.asked if one.options]

    @cached_property
    def variants(self) -> list[list[options.Variant]]:
        """The tokens of each of `ranked` with each of its options."""
        return [options.variants(one, self.rows.encoder) for one in self.ranked]

    @cached_property
    def rules(self) -> list[str]:
        """How the answer of each written question is extracted."""
        fixed = None if self.config.extract == "auto" else self.config.extract
        return [fixed or rule_for(one.gold, one.turn)[0] for one in self.writer.asked]

    @cached_property
    def writer(self) -> Writer:
        """Generation for the metrics that need it."""
        wanted = [one for one in self.asked if one.tests] if EXACT not in self.metrics else list(self.asked)
        return Writer(wanted, self.rows.encoder, self.tokenizer, self.limits, self.config)

    @property
    def writes(self) -> bool:
        """Whether answers are generated."""
        return bool({EXACT, CODE} & set(self.metrics))

    def work(self) -> dict[str, tuple[int, int]]:
        """Return (tokens, passes) through one model by the label of the progress bar, without tasks of lm-eval."""
        found = {}
        if OPTIONS in self.metrics:
            found["options"] = (sum(map(options.tokens_of, self.variants)), 2 * len(self.variants))
        if self.writes:
            count = len(self.writer.asked)
            passes = self.writer.batches * self.writer.longest
            found["answers"] = (self.writer.tokens + count * self.writer.longest, passes)
        return found

    @property
    def tests(self) -> int:
        """Rows whose tests are run."""
        return sum(bool(one.tests) for one in self.writer.asked) if CODE in self.metrics else 0

    @cached_property
    def names(self) -> dict[str, str]:
        """What is kept of one model, each under a name that stands for all that makes it."""
        keys, config, found = self.rows.keys, self.config, dict[str, str]()
        if self.writes:
            found["answers"] = _digest([[keys[one.index] for one in self.writer.asked], self.writer.longest])
        if OPTIONS in self.metrics:
            found["options"] = _digest([[keys[one.index], one.options] for one in self.ranked])
        if CODE in self.metrics:
            tests = [[keys[one.index], one.tests] for one in self.writer.asked if one.tests]
            found["code"] = _digest([tests, self.writer.longest, config.code_seconds, config.code_megabytes])
        for name in self.metrics:
            if name.startswith(HARNESS):
                found[name] = _digest([name, config.generate_rows])
        return {name: f"{'task' if name.startswith(HARNESS) else name}-{digest}" for name, digest in found.items()}

    def label(self, metric: str) -> str:
        """Return what tables call a metric.

        Args:
            metric: The metric.
        """
        return LABELS.get(metric, metric)


def plan(config: MetricsConfig, rows: Rows, others: Sequence[Rows], tokenizer: Any, limits: ModelLimits) -> Plan:
    """Decide what is measured on which rows.

    Args:
        config: The settings.
        rows: The held-out rows.
        others: Rows of the same kind (the target), whose answers are options too.
        tokenizer: The tokenizer of the models.
        limits: How many tokens they take.

    Raises:
        UsageError: A metric needs a flag.
        DataError: No row offers what a metric needs.
        EnvironmentProblem: A package or the isolation of processes is missing.
    """
    check(config)
    names = list(dict.fromkeys(config.names))
    asked = questions(rows, others) if set(names) - {LOSS} else []
    metrics = [name for name in names if name not in ("auto", LOSS)]
    why = ""
    if "auto" in names:
        chosen, why = _auto(config, asked, int(rows.usable.sum()))
        metrics += [name for name in chosen if name not in metrics]
    found = Plan(config, tuple(metrics), rows, asked, [why] if why else [], tokenizer, limits)
    found.said.extend(_described(name, found) for name in metrics)
    return found


def _auto(config: MetricsConfig, asked: Sequence[Question], count: int) -> tuple[list[str], str]:
    """The accuracy that at least half of the rows offer, and why."""
    tested, ranked = ([one for one in asked if getattr(one, what)] for what in ("tests", "options"))
    short = [one for one in asked if _is_short(one)]
    if 2 * len(tested) >= count:
        if config.allow_code_execution:
            return [CODE], ""
        return [], (
            f"metric auto: the loss alone; {len(tested)} of {count} rows have tests, which --allow-code-execution runs "
            "on generated code"
        )
    if 2 * len(ranked) >= count:
        return [OPTIONS], ""
    if 2 * len(short) >= count:
        return [EXACT], ""
    return [], ""


def _is_short(one: Question) -> bool:
    if len(one.gold) > _SHORT or "\n" in one.gold.strip():
        return "####" in one.turn
    return (one.given or re.fullmatch(r"\(?[A-Z]\)?|[-+]?[\d.,]+", one.gold.strip()) is not None) and rule_for(
        one.gold, one.turn
    )[1]


def _described(name: str, found: Plan) -> str:
    """What a metric measures on which rows, in a sentence. Raises: DataError where no row offers it."""
    count = int(found.rows.usable.sum())
    if name == OPTIONS:
        if not found.ranked:
            raise DataError(
                "--metric options: no row has options: neither a column 'options' (--columns options=YOURS), nor a few "
                "answers that repeat; measure exact instead"
            )
        sets = {one.options for one in found.ranked}
        many = f"{min(map(len, sets))} to {max(map(len, sets))}" if len({len(s) for s in sets}) > 1 else len(min(sets))
        return f"metric options: {len(found.ranked)} of {count} rows, each with {many} options ranked by likelihood"
    if name == EXACT:
        if not found.asked:
            raise DataError("--metric exact: no row has a question and an answer in text")
        rules = Counter(found.rules)
        named = ", ".join(f"{rule} ({many})" for rule, many in rules.most_common())
        lost = sum(not equal(extract(rule, one.turn), one.gold)
                   for rule, one in zip(found.rules, found.writer.asked, strict=True))  # fmt: skip
        unsure = (
            f"; in {plural(lost, 'row')} no rule finds the gold answer in the row's own answer: give one with --extract"
            if lost
            else ""
        )
        return (
            f"metric exact: generated answers of at most {found.writer.longest} tokens for {len(found.writer.asked)} "
            f"of {count} rows, compared by rule: {named}{unsure}"
        )
    if name == CODE:
        tested = sum(bool(one.tests) for one in found.writer.asked)
        if not tested:
            raise DataError("--metric code: no row has tests (a column 'tests', or --columns tests=YOURS)")
        sandbox.check()
        return f"metric code: generated code for {tested} of {count} rows, run on the tests of the row"
    return f"metric {name}: by lm-eval" if name.startswith(HARNESS) else ""


def measure(model: Any, found: Plan, *, keep: Keep | None = None, label: str = "") -> dict[str, Measured]:
    """Measure every metric of the plan on one model in evaluation mode.

    Args:
        model: The model.
        found: The plan.
        keep: Where results of an earlier attempt are; None measures anew.
        label: What the progress bars are called.
    """
    kept: Keep = keep or (lambda name, make: make())
    tail = f", {label}" if label else ""
    result: dict[str, Measured] = {}
    texts: list[str] = []
    if found.writes:
        texts = kept(found.names["answers"], lambda: {"texts": _write(model, found, f"answers{tail}")})["texts"]
    for name in found.metrics:
        if name == OPTIONS:
            scores = kept(found.names[name], lambda: {"scores": _score(model, found, f"options{tail}")})
            result[name] = _ranked(found, scores["scores"])
        elif name == EXACT:
            result[name] = _exact(found, texts)
        elif name == CODE:
            said = kept(found.names[name], lambda: {"outcomes": _run(found, texts, f"tests{tail}")})
            result[name] = _passed(found, texts, said["outcomes"])
        else:
            run = partial(harness.measure, model, found.tokenizer, name, rows=found.config.generate_rows)
            task = kept(found.names[name], run)
            result[name] = Measured(range(len(task["values"])), np.asarray(task["values"], dtype=np.float64))
    return result


def _digest(value: object) -> str:
    return files.digest(files.json_bytes(value))[:16]


def _score(model: Any, found: Plan, label: str) -> list[list[tuple[float, int]]]:
    with progress(label, sum(map(options.tokens_of, found.variants)), "tokens") as bar:
        return options.log_likelihoods(model, found.variants, token_budget=2048, advance=bar.advance)


def _write(model: Any, found: Plan, label: str) -> list[str]:
    with progress(label, len(found.writer.asked), "rows") as bar:
        return found.writer.write(model, bar.advance)


def _run(found: Plan, texts: Sequence[str], label: str) -> list[str]:
    asked = [(one, text) for one, text in zip(found.writer.asked, texts, strict=True) if one.tests]
    outcomes = []
    with progress(label, len(asked), "rows") as bar:
        for one, text in asked:
            seconds, megabytes = found.config.code_seconds, found.config.code_megabytes
            outcomes.append(sandbox.outcome(code_of(text), one.tests, seconds=seconds, megabytes=megabytes))
            bar.advance(1)
    return outcomes


def code_of(text: str) -> str:
    r"""Return the code in a text, after its reasoning: its fenced blocks, one after the other, or all of it.

    Args:
        text: The text.

    Example:
        >>> code_of("Here:\n```python\nx = 1\n```\nDone.")
        'x = 1\n'
    """
    text = after_reasoning(text)
    blocks = _FENCE.findall(text)
    return "\n".join(blocks) if blocks else text


def _ranked(found: Plan, scores: Sequence[Sequence[Sequence[float]]]) -> Measured:
    values, chances, answers = [], [], []
    for one, pairs in zip(found.ranked, scores, strict=True):
        sums, counts = (np.asarray(part, dtype=np.float64) for part in zip(*pairs, strict=True))
        ranks = sums if found.config.options_length == "sum" else sums / counts
        best = int(ranks.argmax())
        share = np.exp(sums - sums.max())
        chances.append(float(share[one.right] / share.sum()))
        values.append(float(best == one.right))
        answers.append({"row": one.index, "answer": one.options[best], "gold": one.options[one.right]})
    return Measured(
        [one.index for one in found.ranked], np.asarray(values), {"probability": float(np.mean(chances))}, answers
    )


def _exact(found: Plan, texts: Sequence[str]) -> Measured:
    values, answers = [], []
    for one, rule, text in zip(found.writer.asked, found.rules, texts, strict=True):
        answer = extract(rule, text)
        values.append(float(equal(answer, one.gold)))
        answers.append({"row": one.index, "answer": answer, "gold": one.gold, "text": text})
    missing = float(np.mean([each["answer"] is None for each in answers]))
    return Measured([one.index for one in found.writer.asked], np.asarray(values), {"no_answer": missing}, answers)


def _passed(found: Plan, texts: Sequence[str], outcomes: Sequence[str]) -> Measured:
    asked = [(one, text) for one, text in zip(found.writer.asked, texts, strict=True) if one.tests]
    answers = [
        {"row": one.index, "answer": outcome, "gold": sandbox.PASSED, "text": text}
        for (one, text), outcome in zip(asked, outcomes, strict=True)
    ]
    values = np.asarray([float(outcome == sandbox.PASSED) for outcome in outcomes])
    late = float(np.mean([outcome == sandbox.TIMEOUT for outcome in outcomes]))
    return Measured([one.index for one, _ in asked], values, {"timeouts": late}, answers)
