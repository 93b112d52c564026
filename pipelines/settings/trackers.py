"""`report_to`: where the numbers of a training run go during the run. Imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from datatools import EnvironmentProblem, UsageError
from pipelines.settings.train import TrainConfig

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Tracker -> the packages of which transformers' callback needs one."""


def check(config: TrainConfig) -> None:
    """Refuse a tracker that is not installed, and settings of a validation without its rows.

    Raises:
        EnvironmentProblem: for a tracker that is not installed.
        UsageError: for a validation without rows.
    """
    if not config.eval_data:
        for name, value in (("eval_every", config.eval_every), ("patience", config.patience)):
            if value is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{flag} {value}: there is nothing to evaluate on; name held-out rows with --eval-data"
                )
    packages = PACKAGES.get(config.report_to, ())
    if packages and not any(find_spec(package) for package in packages):
        raise EnvironmentProblem(
            f"--report-to {config.report_to}: {packages[0]} is not installed; pip install {packages[0]}, or leave the "
            "flag out (metrics.jsonl and report.html have the same numbers)"
        )
