"""`datatools order`: estimates what another order of training would have given.

One folder contains a reference run and the results of its tasks; each task computes only what is missing.

    plan      plan.json, order.npz: which source should come first, and a few orders of sources retrained
    curricula curricula.json, order.npz: batches arranged by scores in shapes, estimated or trained
    record    reference.npz, reference/ (anchors with optimizer states)
    estimate  estimates.json: predicted losses of random orders, of curricula, and of the orders of --set sequences=
    search    search.json, order.npz (for `datatools train --order`), the found orders retrained
    validate  validation.json: estimates compared with true retrainings
    map       map.json: the effect of a batch's position on its own loss and on the held-out loss

Every true retraining is a separate file in true/, so that a killed run loses at most one. An estimator is computed
once and then read from surrogates/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipelines import former
from pipelines.engines import team
from pipelines.engines.share import Share
from pipelines.order import cost
from pipelines.order import setting as order_setting
from pipelines.order.curricula import run_curricula
from pipelines.order.estimate import estimate_orders
from pipelines.order.kept import record
from pipelines.order.map import draw_map
from pipelines.order.plan import plan
from pipelines.order.scores import check_scores
from pipelines.order.search import search
from pipelines.order.setting import Setting
from pipelines.order.validate import validate
from pipelines.report import order_page as order_report
from pipelines.rows import preflight
from pipelines.runs import following
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say
from pipelines.runs.workers import leads
from pipelines.settings.order import OrderConfig
from pipelines.training import optimizers

TASKS: dict[str, Callable[[Setting], None]] = {
    "plan": plan,
    "curricula": run_curricula,
    "record": record,
    "estimate": estimate_orders,
    "search": search,
    "validate": validate,
    "map": draw_map,
}
"""Task -> the function that runs it, after the rows and the model have been read."""


def run(config: OrderConfig) -> Path:
    """Run `config.task` in the folder `config.out`, and draw its report.

    Args:
        config: The settings.

    Returns:
        The folder.

    Raises:
        UsageError: Settings contradict each other, or an estimator cannot be used with them.
        DataError: Rows, orders or results cannot be used.
        EnvironmentProblem: Something is too large.
    """
    return team.run(program, config, config.engine, shares=_nothing_to_share(config))


def _nothing_to_share(config: OrderConfig) -> str:
    """Return why several processes cannot help with a task; empty if they can."""
    if config.task == "validate":
        return ""
    return (
        f"of `datatools order`, the true retrainings of validate are shared among processes, and {config.task} runs "
        "in one; leave --workers out and start it once"
    )


def program(config: OrderConfig) -> Path:
    """Do what `run` says in one process, or as a member of a team.

    Args:
        config: The settings.

    Returns:
        The folder.
    """
    optimizers.check(config.training)
    preflight.contradictions(config)
    check_scores(config.scores)
    with in_scratch(config) as kept, Run(kept.out, kept, "order", overwrite=kept.overwrite) as current:
        setting = order_setting.build(kept, current)
        cost.announce(setting)
        cost.check_estimators(setting)
        estimate = cost.estimate_cost(setting)
        share = Share.of(config.engine)
        parts = share.parts(estimate.parts, ("true ", "is there anything to win?"))
        estimate = replace(estimate, parts=parts, based_on=f"{estimate.based_on}{share.text()}")
        estimate.announce()
        if config.dry_run:
            say("dry run: data and model load; no step was taken and nothing was recorded")
            return config.out
        estimate.expect()
        following.begin(current.folder)
        if leads():
            order_report.read(current.folder, again=config.task)
        TASKS[config.task](setting)
        page = order_report.render(current.folder)
        say(f"report: {page}")
    return config.out


former.callable_as(__name__, "run")
