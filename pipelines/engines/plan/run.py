"""`datatools plan`: the stages of a selection on a cluster, simulated, with what limits them."""

from __future__ import annotations

import json
import math
from statistics import median
from typing import Any

from datatools import UsageError
from pipelines.engines.plan import pilot as pilots
from pipelines.engines.plan.job import Job, job_of
from pipelines.engines.plan.show import show
from pipelines.engines.plan.simulation import Outcome, Stage, World, simulate
from pipelines.models.count import parameters
from pipelines.settings.methods import DEFAULT, known
from pipelines.settings.plan import PlanConfig
from pipelines.texts import plural, size


def run(config: PlanConfig) -> dict[str, Any]:
    """Print a plan, and return it.

    Args:
        config: The settings.

    Returns:
        The plan, as `--json` prints it.

    Raises:
        UsageError: Settings do not fit together.
        DataError: The run that was measured cannot be read.
        EnvironmentProblem: The model's configuration cannot be reached.
    """
    found = plan(config)
    if config.as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        show(found)
    return found


def plan(config: PlanConfig) -> dict[str, Any]:
    """Return a plan as plain values; see `run`.

    Args:
        config: The settings.
    """
    pilot = pilots.read(config.run) if config.run is not None else None
    method = known(config.method or (pilot.method if pilot else DEFAULT))
    if pilot is not None and method.name != pilot.method:
        raise UsageError(
            f"--method {method.name}: {config.run} measured the method {pilot.method}; leave --method out, or measure "
            "a run with that method"
        )
    count = pilot.parameters if pilot else parameters(str(config.model))
    job = job_of(config, method, count, pilot)
    if config.gpus > 1 and "model" not in method.needs:
        raise UsageError(
            f"--gpus {config.gpus}: --method {method.name} uses no model and runs as one process; leave --gpus out"
        )
    if config.engine == "local" and job.nodes > 1:
        raise UsageError(
            f"--gpus {config.gpus} with --engine local: local starts its workers on one machine, which has "
            f"{job.kind.per_node}; use --engine ranks or ray, or --set hardware.per_node=N"
        )
    return _described(config, job, job.stages())


def _world(config: PlanConfig, stages: list[Stage], *, slow: bool = True, lost: bool = True) -> World:
    trouble, start = config.trouble, stages[0]
    return World(
        workers=config.gpus,
        stragglers=trouble.stragglers if slow else 0.0,
        slowdown=trouble.slowdown,
        spread=trouble.spread if slow else 0.0,
        failures=trouble.failures * 3600 if lost and trouble.failures else math.inf,
        restart=trouble.restart + start.seconds + start.bytes / start.rate,
        returns=config.engine != "local",
    )


def _trials(config: PlanConfig, stages: list[Stage], **of: bool) -> list[Outcome]:
    world = _world(config, stages, **of)
    trials = config.trouble.trials or max(3, min(20, 5120 // config.gpus))  # all in about a minute at most
    return [simulate(stages, world, seed=config.seed * 100_003 + trial) for trial in range(trials)]


def _described(config: PlanConfig, job: Job, stages: list[Stage]) -> dict[str, Any]:
    whole = _trials(config, stages)
    slow = median(one.total for one in _trials(config, stages, lost=False))
    even = simulate(stages, _world(config, stages, slow=False, lost=False)).total
    totals = sorted(one.total for one in whole)
    total = median(totals)
    rows = [_row(name, stages, whole, total, config.gpus) for name in dict.fromkeys(stage.name for stage in stages)]
    worst = max(rows, key=lambda row: row["seconds"])
    return {
        "job": {
            "rows": job.rows, "tokens_per_row": job.tokens, "tokens": job.rows * job.tokens, "method": job.method.name,
            "parameters": job.parameters, "passes": job.passes, "units": job.units, "rows_per_unit": job.unit,
        },
        "hardware": {
            "workers": config.gpus, "engine": config.engine, "nodes": job.nodes, "kind": config.hardware.name,
            "tflops": job.kind.tflops, "utilisation": job.kind.utilisation, "memory_gb": job.kind.memory_gb,
            "per_node": job.kind.per_node, "disk_write_gb_s": config.hardware.disk_write,
            "disk_read_gb_s": config.hardware.disk_read, "network_gb_s": config.hardware.network,
            "source": f"measured by the run {config.run}" if config.run else job.kind.source,
        },
        "stages": rows,
        "seconds": {
            "median": total, "least": totals[len(totals) // 20], "most": totals[-1 - len(totals) // 20],
            "even": even, "added_by_stragglers": max(0.0, slow - even), "added_by_failures": max(0.0, total - slow),
        },
        "gpu_hours": total * config.gpus / 3600,
        "lost_workers": sum(one.lost for one in whole) / len(whole),
        "work_done_twice_seconds": sum(one.again for one in whole) / len(whole),
        "flops": job.flops,
        "disk_bytes": job.disk,
        "network_bytes": job.network,
        "memory_bytes": job.memory,
        "host_memory_bytes": job.host_memory,
        "fits": job.memory <= job.kind.memory_gb * 1e9,
        "bottleneck": {"stage": worst["stage"], "share": worst["share"], "by": worst["bound"]},
        "advice": _advice(job, worst, config),
    }  # fmt: skip


def _row(name: str, stages: list[Stage], whole: list[Outcome], total: float, workers: int) -> dict[str, Any]:
    ours = [stage for stage in stages if stage.name == name]
    work = sum(stage.units * stage.seconds for stage in ours)
    moved = sum(stage.units * stage.bytes / stage.rate for stage in ours)
    alone = ours[0].alone
    if moved > work / (1 if alone else workers):
        bound = "the shared folder"
    elif alone:
        bound = "one worker" + (f", {workers - 1:,} wait" if workers > 1 else "")
    else:
        bound = ours[0].bound
    seconds = median(one.seconds.get(name, 0.0) for one in whole)
    return {
        "stage": name,
        "seconds": seconds,
        "even_seconds": sum(stage.ideal(workers) for stage in ours),
        "share": seconds / total if total else 0.0,
        "shared": not alone,
        "bound": bound,
    }


def _advice(job: Job, worst: dict[str, Any], config: PlanConfig) -> list[str]:
    """Return what to do about the bottleneck, and what will not work."""
    found = []
    if job.memory > job.kind.memory_gb * 1e9:
        found.append(
            f"the model does not fit: {size(job.memory)} are needed and a worker has {size(job.kind.memory_gb * 1e9)}; "
            "each worker holds the whole model, so take larger GPUs, or select with a smaller model"
        )
    if worst["share"] < 0.25:
        return found
    stage, folder = worst["stage"], worst["bound"] == "the shared folder"
    if stage == "warm-up":
        found.append(
            "the warm-up trains in one process; train a LoRA run with torchrun and `datatools train`, and give its "
            "checkpoints with --checkpoints (here: --warmup-share 0), or warm up on less (--set warmup.fraction=0.01)"
        )
    elif stage == "features" and folder:
        found.append("write less: a smaller --dim, int8 or 1-bit features, or fewer checkpoints; more GPUs do not help")
    elif stage == "features":
        cheaper = "" if job.method.passes else ", or --method auto, which takes gradients of a quarter of the rows once"
        found.append(
            f"more GPUs help nearly in proportion, up to {plural(job.units, 'unit')} per pass; so do fewer checkpoints"
            f"{cheaper if job.gradients else ''}"
        )
    elif stage == "scores":
        found.append("scores come from one process; store less (--dim, int8), or take fewer checkpoints")
    elif stage == "index":
        found.append("rows are read by one core of each worker; more workers help, also ones without a GPU")
    elif stage in ("start", "columns"):
        found.append(f"most of the time goes into starting; {plural(config.gpus, 'worker')} are more than it needs")
    return found
