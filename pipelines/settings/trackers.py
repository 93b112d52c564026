"""The setting `report_to`: where else the numbers of a training run go during the run. No import here is heavy."""

from __future__ import annotations

from importlib.util import find_spec

from datatools import EnvironmentProblem, UsageError
from pipelines.settings.train import TrainConfig

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Tracker -> packages; transformers' callback needs one of them."""


def check(config: TrainConfig) -> None:
    """Refuse a tracker that is not installed, and validation settings without validation rows.

    Args:
        config: The settings of `datatools train`.

    Raises:
        EnvironmentProblem: The tracker is not installed.
        UsageError: A validation setting is given without rows.
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
