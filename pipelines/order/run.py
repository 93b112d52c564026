"""`datatools order`: what would another order of training have done?

One folder holds a reference run and what its tasks made of it; each task does what is not done yet.

    record    reference.npz, reference/ (anchors with optimizer states)
    estimate  estimates.json: predicted losses of random orders, of curricula, and of the orders of --set sequences=
    search    search.json, order.npz (for `datatools train --order`), the found orders retrained
    validate  validation.json: estimates against true retrainings
    map       map.json: what the place of a batch does to its own loss and to the held-out loss

Every true retraining is a file of its own in true/, so a killed run loses at most one; an estimator is made once, and
read from surrogates/ afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines import former
from pipelines.order import cost
from pipelines.order import setting as order_setting
from pipelines.order.estimate import estimate_orders
from pipelines.order.kept import record
from pipelines.order.map import draw_map
from pipelines.order.search import search
from pipelines.order.setting import Setting
from pipelines.order.validate import validate
from pipelines.report import order_page as order_report
from pipelines.rows import preflight
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say
from pipelines.runs.workers import alone
from pipelines.settings.order import OrderConfig
from pipelines.training import optimizers

TASKS: dict[str, Callable[[Setting], None]] = {
    "record": record,
    "estimate": estimate_orders,
    "search": search,
    "validate": validate,
    "map": draw_map,
}
"""Task -> what does it, once the rows and the model are read."""


def run(config: OrderConfig) -> Path:
    """Do `config.task` in the folder `config.out`, and draw its report.

    Returns:
        the folder.

    Raises:
        UsageError: for settings that contradict each other, or an estimator that cannot be made with them.
        DataError: for rows, orders or results that cannot be used.
        EnvironmentProblem: for what does not fit.

    """
    alone("datatools order")
    optimizers.check(config.training)
    preflight.contradictions(config)
    with in_scratch(config) as kept, Run(kept.out, kept, "order", overwrite=kept.overwrite) as current:
        setting = order_setting.build(kept, current)
        cost.announce(setting)
        cost.check_estimators(setting)
        estimate = cost.estimate_cost(setting)
        estimate.announce()
        if config.dry_run:
            say("dry run: data and model load; no step was taken and nothing recorded")
            return config.out
        estimate.expect()
        order_report.read(current.folder, again=config.task)
        TASKS[config.task](setting)
        page = order_report.render(current.folder)
        say(f"report: {page}")
    return config.out


former.callable_as(__name__, "run")
