"""Tasks of lm-eval by their names: an optional package that brings the prompts and, from the hub, the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datatools import DataError, EnvironmentProblem, UsageError, did_you_mean
from pipelines.models.quiet import quiet
from pipelines.settings.metrics import HARNESS
from pipelines.texts import first_line

_FIRST = ("acc", "exact_match", "pass@1", "acc_norm", "f1")
"""Which number of a task is its accuracy, where it has several."""


def measure(model: Any, tokenizer: Any, name: str, *, rows: int | None = None) -> dict[str, Any]:
    """The accuracy of `model` on one task.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        name: `lm-eval:` and the name of a task, or the path of its YAML file.
        rows: The first so many rows of the task; None is all.

    Returns:
        `values`, one number per row, and `chosen`, the name of the number.

    Raises:
        UsageError: There is no such task.
        EnvironmentProblem: The task's data cannot be read.
        DataError: The task gives no number per row.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = name.removeprefix(HARNESS)
    with quiet():
        manager = TaskManager()
        if not task.endswith((".yaml", ".yml")) and task not in manager.all_tasks:
            raise UsageError(f"--metric {name}: lm-eval has no task {task!r}{did_you_mean(task, manager.all_tasks)}")
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
                tasks=[task],
                limit=rows,
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
                confirm_run_unsafe_code=False,
            )
        except (OSError, ValueError, ImportError) as error:
            raise EnvironmentProblem(f"--metric {name}: lm-eval cannot run it: {first_line(error)}") from error
    samples = [sample for part in found["samples"].values() for sample in part]
    chosen = _number_of(samples)
    if chosen is None:
        raise DataError(f"--metric {name}: the task gives no number for each of its rows; ask for a task that does")
    return {"values": [float(sample[chosen]) for sample in samples], "chosen": chosen}


def _number_of(samples: list[Mapping[str, Any]]) -> str | None:
    if not samples:
        return None
    there = [key for key in samples[0] if all(isinstance(one.get(key), int | float | bool) for one in samples)]
    there = [key for key in there if key not in ("doc_id", "doc_hash", "prompt_hash", "target_hash")]
    return next((key for key in _FIRST if key in there), there[0] if there else None)
