"""`datatools select`: from a pool of rows, a few target rows and a model to the rows worth training on, and why."""

from __future__ import annotations

import shlex
from collections import Counter
from functools import cache
from pathlib import Path

from rich.console import Console

from datatools import (
    SELECTORS,
    Budget,
    DataError,
    UsageError,
    files,
)
from pipelines import former
from pipelines.engines import team
from pipelines.models import load as models
from pipelines.report import select_page, terminal
from pipelines.rows import leakage, preflight
from pipelines.rows.inputs import Inputs
from pipelines.runs import following, verdicts, workers
from pipelines.runs.folder import Run
from pipelines.runs.messages import quiet, say, warn
from pipelines.select import cost, objectives
from pipelines.select.choose import choose
from pipelines.select.race import Race
from pipelines.select.scored import Context, candidates
from pipelines.select.scorer import scorer
from pipelines.select.write import write
from pipelines.settings.dump import as_dict, fingerprint
from pipelines.settings.load import load_config
from pipelines.settings.methods import known
from pipelines.settings.select import SelectConfig
from pipelines.training import optimizers


def run(config: SelectConfig) -> Path:
    """Select, and write `selected.jsonl`, the two tables, `summary.json` and `report.html` to `out`.

    An interrupted run continues where it stopped; a pool that has grown costs only its new rows. An existing selection
    is never replaced: the same one keeps its audit; another budget, cap, selector or aggregation is refused; and when
    the pool has grown, the earlier selection moves to `selected.old-N`.

    Args:
        config: The settings.

    Returns:
        The folder of the run.

    Raises:
        UsageError: Settings make no sense, or would replace a selection.
        DataError: Rows, checkpoints or features cannot be used.
        EnvironmentProblem: The machine cannot do it.
    """
    return team.run(program, config, config.engine, shares=_nothing_to_share(config))


def _nothing_to_share(config: SelectConfig) -> str:
    """Return why several processes cannot help with a selection; empty if they can."""
    if "model" in known(config.method).needs:
        return ""
    return (
        f"--method {config.method} uses no model, and only work of a model is shared among processes; leave "
        "--workers out and start it once"
    )


def program(config: SelectConfig) -> Path:
    """Do what `run` says in one process, or as a member of a team.

    Args:
        config: The settings.

    Returns:
        The folder of the run.
    """
    Budget.parse(config.budget)  # so that a typing error does not cost a warm-up
    check(config)
    _refuse_another_selection(config)
    if config.dry_run:
        return _dry_run(config)
    with Run(config.out, config, "select", overwrite=config.overwrite) as current:
        context = _context(config, current)
        Budget.parse(config.budget).resolve(candidates(context.pool))  # nor does a budget that the pool cannot fill
        with current.stage("cost"):
            race = Race(context) if config.verify else None
            before = cost.estimate(context, race) if workers.leads() else {}
        following.begin(current.folder)
        scored = scorer(config.method).score(context)
        if race is not None:
            with current.stage("verify"):
                scored = race.run(scored)
        following.leave()
        with current.stage("select and write"):
            selection = choose(context, scored)
            summary = write(context, scored, selection, before)
        path = select_page.render(current.folder)
    if not quiet():
        terminal.show(summary, Console(stderr=True))
    say(f"report: {path}")
    return config.out


def check(config: SelectConfig) -> None:
    """Refuse names that do not exist before anything is read, so that a typing error does not cost a warm-up.

    Args:
        config: The settings.

    Raises:
        UsageError: A name is unknown, or the method cannot work with the settings.
    """
    preflight.check_names(config)
    preflight.contradictions(config)
    optimizers.check(config.warmup)
    if config.selector is not None:
        _check_selector(config, config.selector)
    objectives.check(config, known(config.method).objectives)
    scorer(config.method).check(config)


def _check_selector(config: SelectConfig, name: str) -> None:
    if SELECTORS[name].scores and not SELECTORS[known(config.method).selector].scores:
        raise UsageError(
            f"--selector {name} needs scores, and --method {config.method} gives none; leave one of them out"
        )
    if SELECTORS[name].similarity and "target" not in known(config.method).needs:
        raise UsageError(
            f"--selector {name} chooses by the similarity to each target row, and --method {config.method} compares "
            "with none; use a method that does (datatools ls methods), such as tfidf, rds or less"
        )
    if SELECTORS[name].reference and not config.target:
        raise UsageError(f"--selector {name} compares with target rows; name them with --target FILE")


def _refuse_another_selection(config: SelectConfig) -> None:
    """Refuse settings that would replace the selection in `out`, and name the command that makes the new one."""
    folder, path = config.out, config.out / "run.yaml"
    if config.overwrite or not (folder / verdicts.SELECTED).is_file() or not path.is_file():
        return
    try:
        before = load_config(SelectConfig, path)
    except (UsageError, DataError):
        return  # `Run` reports what is wrong with it
    if fingerprint(before) != fingerprint(config):
        return  # `Run` reports which settings of the whole run differ
    old, new = (as_dict(one, leave_out=("volatile", "elsewhere")) for one in (before, config))
    differing = [f"{name} was {old[name]}, is {new[name]}" for name in old if old[name] != new[name]]
    if not differing:
        return
    again = ""
    if known(config.method).stored:
        flags = " ".join(scorer(config.method).reuse(config))
        again = f" (with {shlex.join(flags.split(' '))} it computes no gradient again)"
    raise UsageError(
        f"{folder} holds a selection made with other settings: {'; '.join(differing)}. {verdicts.SELECTED} is not "
        f"replaced: select into another --out{again}, or move the whole "
        f"run to {folder}.old-N with --overwrite"
    )


def _context(config: SelectConfig, current: Run) -> Context:
    """Read and check everything, and compare it with the inputs with which the run in this folder began."""
    with current.stage("read"):
        tokenizer = models.load(config.model, tokenizer_only=True)
        inputs = Inputs(current, config.model, tokenizer)
        pool = inputs.read("pool", config.train, group="data", bad_rows=True)
        target = inputs.read_like("target", config.train, config.target, config.target_columns)
        if target is not None and (empty := [file.path for file in target.pool.files if not file.rows]):
            raise DataError(f"no row in --target {', '.join(empty)}; leave the file out or fill it")
        if target is not None and (seen := leakage.find(target, {"pool": (pool, None)})):
            warn(
                f"{leakage.sentence(seen, 'target rows')}: similarity ranks such rows first, "
                "and rows that the target already contains add little to it"
            )
    inputs.record(by_content=("data", "target"), grows=("data",))

    @cache
    def model() -> models.LoadedModel:
        with current.stage("load model"):
            return models.load(config.model, tokenizer=tokenizer)

    return Context(config, current, pool, target, model, more=config.verify)


def _dry_run(config: SelectConfig) -> Path:
    """Do everything up to the first gradient in a temporary folder, and print what the run would cost."""
    with files.scratch_folder() as scratch:
        inner = config.model_copy(update={"out": scratch / "run", "overwrite": False})
        with Run(inner.out, inner, "select") as current:
            context = _context(inner, current)
            cost.estimate(context, Race(context) if config.verify else None)
            budget = Budget.parse(config.budget).resolve(candidates(context.pool))
            asked = f"{budget.rows} rows" if budget.rows is not None else f"{budget.tokens} tokens"
            say(f"budget {config.budget}: {asked}")
            for reason, count in sorted(Counter(bad.reason for bad in context.pool.bad).items()):
                say(f"bad rows: {count} {reason}")
    say("dry run: nothing was written; the same command without --dry-run does it")
    return config.out


former.callable_as(__name__, "run")
