"""The cost of a selection: measured on synthetic rows before anything is computed, over all attempts of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch

from datatools import DatatoolsError, files, visit_per_sample_grads
from pipelines.engines.share import Share
from pipelines.models.losses import losses_for, row_losses
from pipelines.runs.memory import explained
from pipelines.runs.messages import library_warnings
from pipelines.select import parameters
from pipelines.select.race import Race
from pipelines.select.scored import Context
from pipelines.select.scorer import scorer
from pipelines.settings.methods import known
from pipelines.training import checkpoints, cost


def estimate(context: Context, race: Race | None = None) -> dict[str, Any]:
    """Estimate rows, tokens, seconds and bytes of the whole run, over all attempts, from a timed batch.

    Announces what is left of them. What existed before the run began, such as features that another run computed, does
    not count.

    Args:
        context: What is to be scored.
        race: The race of candidates that follows the scores.
    """
    config, pool, run_ = context.config, context.pool, context.run
    began, spent, team = run_.seconds, time.monotonic(), Share.of(config.engine)
    found: dict[str, Any] = {"rows": int(pool.usable.sum()), "tokens": 0, "seconds": None, "bytes": 0}
    work, method = scorer(config.method).work(context), known(config.method)
    whole, left = work.whole, work.left
    memory, based = cost.peak(), ""
    first = _first_estimate(context, sum(whole.values()) - sum(left.values()))
    todo = sum(left.values())
    if whole:
        if todo or config.dry_run or "seconds_a_token" not in first:
            rate, memory = pace(context, backward="gradients" in method.needs) if todo else (0.0, memory)
            first.setdefault("seconds_a_token", rate)
            based = f"timed on synthetic tokens{f' {cost.place(context.model().model)}' if todo else ''}"
        first.setdefault("spent", began + time.monotonic() - spent)
        rate = first["seconds_a_token"]
        found["tokens"] = max(0, round(sum(whole.values()) - first["given"]))
        share = found["tokens"] / max(1.0, sum(whole.values()))  # of the whole, what was not there before
        found["seconds"] = first["spent"] + share * sum(team.parts(_seconds(rate, whole)).values())
        found["given"] = first["given"]
        found["bytes"] = work.bytes
        if not config.dry_run:
            files.write_json(run_.path("cost.json"), first)
        run_.expect({label: seconds for label, seconds in team.parts(_seconds(rate, left)).items() if seconds})
    parts = team.parts(_seconds(first.get("seconds_a_token", 0.0), left))
    if race is not None and (prices := race.prices()) is not None:
        all_, missing = prices
        found["tokens"] += all_.tokens
        found["seconds"] = (found["seconds"] or 0.0) + sum(team.parts(all_.parts).values())
        found["bytes"] += race.runs * all_.adapter
        todo += missing.tokens
        parts |= team.parts(missing.parts)
        memory = max(memory, all_.memory(config.training.micro_tokens))
        run_.expect({label: seconds for label, seconds in parts.items() if seconds})
    done = found["tokens"] - todo
    cost.Estimate(
        parts=parts,
        tokens=round(todo),
        memory=memory * (1 if cost.on_gpu() else team.here),  # each worker has a GPU of its own
        disk=found["bytes"],
        done=f"{found['rows']:,} rows" + (f", {done:,.0f} of {found['tokens']:,} tokens are done" if done >= 1 else ""),
        based_on=f"{based}{team.text()}" if based else "",
    ).announce()
    return found


def _first_estimate(context: Context, there: float) -> dict[str, float]:
    """Return what the first attempt of this run measured; `there` is the work in tokens that was done before it."""
    path = context.run.path("cost.json")
    if context.run.resumed and path.is_file():
        with suppress(DatatoolsError):
            kept = files.read_json(path, limit=1_000_000)
            if isinstance(kept, dict) and all(isinstance(kept.get(k), int | float) for k in ("given", "spent")):
                return {str(key): float(value) for key, value in kept.items()}
    return {"given": 0.0 if context.run.resumed else float(there)}


def _seconds(rate: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds that each part takes, from its tokens."""
    # a training token costs about a quarter more: LoRA adds work to its layer, and batches have more padding
    return {name: rate * tokens * (1.25 if name.startswith("warm-up") else 1.0) for name, tokens in parts.items()}


def pace(context: Context, samples: int = 2, *, backward: bool = True) -> tuple[float, int]:
    """Return the seconds per token, timed on synthetic rows of the pool's median length, and the peak memory in bytes.

    The memory is that of the GPU if the model computes there.

    Args:
        context: What is to be scored.
        samples: The number of timed passes; the fastest counts.
        backward: Whether to time a forward pass and per-row gradients, at the user's first checkpoint or with fresh
            adapters, instead of a forward pass alone.
    """
    loaded, pool = context.model(), context.pool
    length = int(np.median(pool.scan.tokens[pool.usable]))
    batch = cost.made_up(loaded.model, length, 256)
    times = []
    method: Any = context.config.features.method
    losses = losses_for(method)
    large = f"rows of {length:,} tokens; use --dtype bfloat16, cut rows with --max-length, or take a smaller model"
    timed = _as_trained(context) if backward else nullcontext(loaded.model)
    with torch.random.fork_rng(devices=[]), explained(large), timed as module:
        names: list[str] = []
        if backward:
            names = parameters.covered_by(module, checkpoints.trainable(module), context.config.features)
        kept = cost.saved(module, batch) / batch["input_ids"].numel() if backward else 0.0
        for _ in range(samples):
            begin = time.perf_counter()
            if backward:
                with library_warnings():
                    visit_per_sample_grads(losses, module, batch, names, lambda name, grad: None, method=method)
            else:
                with torch.inference_mode():
                    row_losses(module, batch)
            times.append(time.perf_counter() - begin)
    config = context.config
    width = max(config.features.token_budget, config.warmup.micro_tokens if backward else 0)
    return min(times) / batch["input_ids"].numel(), int(cost.peak() + kept * width)


@contextmanager
def _as_trained(context: Context) -> Iterator[Any]:
    """Yield the model at the user's first checkpoint, or with fresh adapters; for whole weights, the model itself."""
    config, model = context.config, context.model().model
    if not config.checkpoints:
        with cost.as_trained(model, config.lora) as module:
            yield module
        return
    first = checkpoints.find(config.checkpoints)[0]
    if not first.is_adapter:
        yield model
        return
    with checkpoints.at(first, config.model, model) as module:
        yield module
