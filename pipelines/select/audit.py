"""`datatools audit`: is the selection better than simple baselines, with the same recipe, seeds and number of rows?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from datatools import DataError, DatatoolsError, files
from pipelines.engines import team
from pipelines.engines.share import Share
from pipelines.models import load as models
from pipelines.report import select_page
from pipelines.rows import leakage, preflight
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs import following, run_files, verdicts, workers
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say
from pipelines.runs.redact import redact
from pipelines.select import compare
from pipelines.select.arms import BASE, SLOWER, Scores, Task, as_select, rows_of, slower, tasks
from pipelines.select.bench import Bench, Result, prepare
from pipelines.select.oracle import oracle
from pipelines.select.prices import Prices
from pipelines.select.scored import Context
from pipelines.select.verdict import judge, print_table
from pipelines.settings.audit import AuditConfig
from pipelines.settings.methods import FULL, SCORERS, default_arms, known
from pipelines.settings.methods import method as method_of
from pipelines.settings.yaml import read_yaml
from pipelines.training import cost, evaluation, optimizers
from pipelines.training.accuracy import measure


def run(config: AuditConfig) -> Path:
    """Write `audit.json` to `out` and into the selection's own report, and print the table.

    `predictions.jsonl` has what each model answered to the held-out rows, if more than the loss is measured.

    Every arm has the same number of rows and the same recipe, except `full`, which is one epoch over the whole pool. A
    seed determines the initial adapters and the order of the rows, and, for random arms, the rows themselves. Finished
    arms are kept, so an interrupted audit continues.

    Args:
        config: The settings.

    Returns:
        The folder of the audit.

    Raises:
        UsageError: Settings contradict each other, or a file does not exist.
        DataError: Rows cannot be used, or test rows were trained on or selected for.
        EnvironmentProblem: The machine cannot do it.
    """
    return team.run(program, config, config.engine)


def program(config: AuditConfig) -> Path:
    """Do what `run` says in one process, or as a member of a team.

    Args:
        config: The settings.

    Returns:
        The folder of the audit.
    """
    preflight.contradictions(config)
    if (config.selected.parent / "run.yaml").is_file():
        run_files.refuse_special(config.selected.parent)
    optimizers.check(config.training)
    with in_scratch(config) as kept, Run(kept.out, kept, "audit", overwrite=kept.overwrite) as current:
        with current.stage("read"):
            loaded = models.load(config.model)
            inputs = Inputs(current, config.model, loaded)
            pool = inputs.read("pool", config.pool)
            test = inputs.read("test", config.test)
            target = inputs.read_like("target", config.pool, config.target, config.target_columns, recorded=False)
        if text := run_files.note(config.selected.parent):
            say(text)
        chosen, judged = rows_of(config.selected, pool)
        leaks = _leaks(config, test, pool, target, chosen)
        inputs.record(by_content=("pool", "test", "selection"), encoding=False, selection=judged)
        against = _against(config)
        plan = measure.plan(config.metrics, test, [] if target is None else [target], loaded.tokenizer, loaded.limits)
        for sentence in plan.said:
            say(sentence)
        scores = Scores(
            {
                arm: Context(as_select(config, arm), current, pool, target, lambda: loaded)
                for arm in against
                if arm != FULL
            }
        )
        assert config.lora is not None  # checked before anything is read
        bench = Bench(config.lora, config.arms or config.out / "arms", loaded, pool, test, plan)
        checks = oracle(config, pool, current, against, chosen) if config.oracle else None
        noise = checks.noise_work(inputs, target, loaded) if checks is not None else {}
        if config.dry_run:
            planned = _all(tasks(scores, pool, config, against, chosen, planned=True), config)
            planned += checks.tasks({}) if checks is not None else []
            _estimate(config, bench, target, planned, _scores(against), noise).announce()
            say("dry run: data and model load; nothing was scored or trained")
            return config.out
        following.begin(current.folder)
        with current.stage("baselines"):
            todo = _all(tasks(scores, pool, config, against, chosen), config)
            known_scores = checks.scores(scores) if checks is not None else {}
            todo += checks.tasks(known_scores) if checks is not None else []
        if workers.leads():
            estimate = _estimate(config, bench, target, todo, [], noise)
            estimate.announce()
            estimate.expect()
        noticed = None
        if checks is not None:
            with current.stage("swapped answers"):
                noticed = checks.noise(inputs, target, loaded)
        with current.stage("train and evaluate"):
            wanted = [bench.wanted_base(BASE)]
            for place, task in enumerate(todo, start=1):
                wanted.append(bench.wanted(task.rows, task.recipe, task.seed, task.label(place, len(todo))))
            prepare(bench.home, wanted, "arms")
            following.leave()
            base = bench.base(BASE)
            done = [
                (task, bench.run(task.rows, task.recipe, task.seed, task.label(place, len(todo))))
                for place, task in enumerate(todo, start=1)
            ]
        rows = int(test.usable.sum())
        audit = judge(base, [one for one in done if not one[0].group], rows, plan, config)
        if config.lr_check:
            again = judge(base, [one for one in done if one[0].group == SLOWER], rows, plan, config)
            rate = config.training.learning_rate
            audit["lr_check"] = compare.held(rate, audit["metrics"], again["metrics"]) | {
                "verdict": again["verdict"],
                "table": again["table"],
            }
        if checks is not None:
            audit["oracle"] = checks.judged(done, known_scores) | {"noise": noticed}
        audit |= _told(leaks) | {"selection": judged} | _models(config, loaded)
        if plan.metrics:
            files.write_text(current.path("predictions.jsonl"), "".join(_predictions(base, done, test)))
        files.write_json(current.path("audit.json"), audit)
        if verdicts.deliver(config.selected.parent, audit):
            say(f"report: {select_page.render(config.selected.parent)}")
    print_table(audit, Console())
    return config.out


def _models(config: AuditConfig, loaded: models.LoadedModel) -> dict[str, Any]:
    """Return which model was trained and which one chose the rows, where the run of the selection says so."""
    trained = redact(str(config.model.name))
    try:
        run = read_yaml(config.selected.parent / "run.yaml")
        facts = files.read_json(config.selected.parent / "provenance.json")["facts"]
    except (DatatoolsError, OSError, KeyError, TypeError):  # rows of another origin, or a run of an early version
        return {"models": {"trained": trained}}
    settings, method = run.get("model"), str(run.get("method"))
    chose = settings.get("name") if isinstance(settings, Mapping) else settings
    if not isinstance(chose, str):
        return {"models": {"trained": trained}}
    found = {"trained": trained, "selected": redact(chose)}
    record = method_of(method)
    if facts.get("model") != dict(loaded.digests) and (record is None or "model" in record.needs):
        found["sentence"] = f"The rows were selected with {found['selected']} ({method}); the audit trained {trained}."
    return {"models": found}


def _predictions(base: Result, done: Sequence[tuple[Task, Result]], test: Rows) -> Iterator[str]:
    """Yield what the untrained model and every trained one answered, a line per row and metric; without the checks."""
    yield from evaluation.prediction_lines(test, base.measured, {"arm": BASE})
    for task, result in done:
        if not task.group:
            yield from evaluation.prediction_lines(test, result.measured, {"arm": task.arm, "seed": task.seed})


def _against(config: AuditConfig) -> list[str]:
    """Return the arms besides the selection."""
    if config.against is not None:
        return config.against
    found = list(default_arms(target=bool(config.target)))
    missing = [arm for arm in default_arms(target=True) if arm not in found]
    if missing:
        say(f"no target rows: the audit goes without {', '.join(missing)} (--target FILE)")
    return found


def _all(found: list[Task], config: AuditConfig) -> list[Task]:
    """Return the training runs, with those of the check of the learning rate."""
    return [*found, *(slower(found) if config.lr_check else [])]


def _leaks(config: AuditConfig, test: Rows, pool: Rows, target: Rows | None, chosen: list[int]) -> list[dict[str, Any]]:
    """Return where test rows were seen before.

    Raises:
        DataError: They were, and that is not allowed.
    """
    others: dict[str, tuple[Rows, list[int] | None]] = {"selection": (pool, chosen), "pool": (pool, None)}
    if target is not None:
        others["target"] = (target, None)
    near = config.pool.near_threshold if config.pool.dedup == "near" else None
    found = leakage.find(test, others, near=near)
    if found and not config.allow_overlap:
        raise DataError(
            f"audit: {leakage.sentence(found)}; losses on rows that were trained on or selected for prove nothing. "
            "Take them out of --test, or audit all the same with --allow-overlap: the report will say so"
        )
    return found


def _told(leaks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"overlap": leaks, "leaked": leakage.sentence(leaks)} if leaks else {}


def _scores(against: Sequence[str]) -> list[str]:
    """Return the arms whose scores cost passes of a model."""
    return [arm for arm in SCORERS if arm in against and known(arm).forward]


def _estimate(
    config: AuditConfig,
    bench: Bench,
    target: Rows | None,
    todo: Sequence[Task],
    scores: Sequence[str],
    noise: Mapping[str, tuple[float, bool]],
) -> cost.Estimate:
    """Return the cost of what is missing: runs, measurements, the scores of `scores`, and those of `noise`.

    A run whose rows stand for others, which scores will choose, counts as not done.
    """
    prices, pool, done = Prices(bench, config.training), bench.pool, 0
    prices.measured(BASE)
    part_of = {"pool": pool.tokens(), "target": target.tokens() if target is not None else 0}
    for arm in scores:
        whole = sum(part_of[rows] for rows in known(arm).forward)
        prices.passes(f"scores of {arm}", whole, max(1, whole // 1024))
    for arm, (many, gradient) in noise.items():
        prices.passes(f"swapped answers, {arm}", many, max(1.0, many // 1024), gradient=gradient)
    for place, task in enumerate(todo, start=1):
        label = task.label(place, len(todo))
        folder = bench.folder(task.rows, task.recipe, task.seed)
        if bench.is_measured(folder) and not task.planned:
            done += 1
            continue
        if not bench.is_trained(folder):
            prices.trained(label, task.recipe, pool.scan.tokens[task.rows].tolist())
        prices.measured(label)
    share = Share.of(config.engine)
    return cost.Estimate(
        parts=share.parts(prices.parts),
        tokens=prices.tokens,
        memory=prices.memory(config.training.micro_tokens) * (1 if cost.on_gpu() else share.here),
        disk=(len(todo) - done) * prices.adapter,
        done=f"{done} of {len(todo)} training runs are done" if done else "",
        based_on=f"{len(todo)} training runs; {prices.found.text()}{share.text()}",
    )
