"""`datatools diagnose`: how a model's weights, gradients and loss surface look on rows, and a report with pictures.

Each check writes `checks/NAME.json` when it is done, so that a run that was stopped goes on with the next. Memory: a
gradient of the whole model (for smoothness that of a Hessian-vector product), and one tensor at a time beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import optim
from datatools import DataError, UsageError, files, token_batches
from optim import diagnostics
from pipelines.models import load as models
from pipelines.models.load import LoadedModel
from pipelines.models.losses import collate, supervised_tokens, token_losses
from pipelines.report import diagnose_page as diagnose_view
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs.folder import Run, in_scratch
from pipelines.runs.messages import say
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.runs.workers import alone
from pipelines.settings import redaction
from pipelines.settings.base import Json
from pipelines.settings.diagnose import CHECKS, DiagnoseConfig
from pipelines.training import cost

BASIS_BYTES = 2**30  # Lanczos keeps its vectors up to this size, and only the last two beyond


def run(config: DiagnoseConfig) -> Path:
    """Run the checks that are not done yet, and write `diagnose.json` and `report.html` to `out`.

    Raises: UsageError, DataError, EnvironmentProblem, each with what to do.
    """
    alone("datatools diagnose")
    chosen = [name for name in CHECKS if name in config.checks]
    _check_optimizers(config)
    with in_scratch(config) as kept, Run(kept.out, kept, "diagnose", overwrite=kept.overwrite) as current:
        with current.stage("read"):
            tokenizer = models.load(config.model, tokenizer_only=True)
            inputs = Inputs(current, config.model, tokenizer)
            rows = inputs.read("data", config.data, bad_rows=True)
        picked = pick(rows, config.rows, seed=derive_seed(config.seed, "rows"))
        inputs.record()
        tokens = int(rows.scan.tokens[picked].sum())
        say(f"{len(picked):,} rows, {tokens:,} tokens; checks: {', '.join(chosen)}; {_passes(config, chosen)}")
        if config.dry_run:
            _estimate(config, chosen, tokens, len(picked)).announce()
            say("dry run: data and model load; nothing was measured")
            return config.out
        files.make_folder(current.path("checks"))
        todo = [name for name in chosen if _result(current, name) is None]
        loaded = _load(config) if set(todo) - {"double-descent"} else None
        for name in todo:
            with current.stage(name):
                found = _measure(name, loaded, rows, picked, config)
                files.write_json(current.path("checks", f"{name}.json"), _plain(found))
        summary: dict[str, Any] = {
            "format": 1,
            "model": config.model.name,
            "adapter": None if config.model.adapter is None else str(config.model.adapter),
            "data": {"paths": list(config.data.paths), "rows": len(picked), "of": len(rows), "tokens": tokens},
            "seed": config.seed,
            "created": current.provenance["created"],
            "versions": current.provenance["versions"],
            "checks": {name: _result(current, name) for name in chosen},
        }
        files.write_json(current.path("diagnose.json"), redaction.hide_all(summary))
        diagnose_view.render(current.folder)
        say(f"report: {current.path('report.html')}")
    return config.out


def pick(rows: Rows, most: int, *, seed: int) -> list[int]:
    """At most so many usable rows, drawn at random, in file order."""
    usable = np.flatnonzero(rows.usable)
    drawn = np.random.default_rng(seed).choice(usable, min(most, len(usable)), replace=False)
    return sorted(int(i) for i in drawn)


def _check_optimizers(config: DiagnoseConfig) -> None:
    for name in config.updates:
        try:
            optim.create(name, optim.example_parameters(), lr=1.0)
        except (ValueError, TypeError) as error:
            raise UsageError(f"updates: {error}") from error


def _passes(config: DiagnoseConfig, chosen: Sequence[str]) -> str:
    """The cost in passes over the rows, forward and backward."""
    return f"about {_counted(config, chosen):,} forward and backward passes over them"


def _counted(config: DiagnoseConfig, chosen: Sequence[str]) -> int:
    """Passes over the rows; a Hessian-vector product counts as three."""
    probes = config.probes * (2 if config.rotate else 1) + config.lanczos_steps + FROBENIUS_PROBES
    each = {"sharpness": 1, "spectrum": 1, "smoothness": 1 + 3 * probes}
    return sum(each.get(name, 0) for name in chosen)


def _estimate(config: DiagnoseConfig, chosen: Sequence[str], tokens: int, rows: int) -> cost.Estimate:
    """What the checks will take; the spectra of large matrices come on top, and double-descent on its own data."""
    loaded = _load(config)
    found = cost.probe(loaded.model, tokens // max(1, rows))
    seconds = _counted(config, chosen) * found.seconds(tokens, max(1, tokens // config.token_budget))
    kept = min(BASIS_BYTES, 4 * found.trainable * config.lanczos_steps) if "smoothness" in chosen else 0
    return cost.Estimate(
        parts={"checks": seconds},
        tokens=_counted(config, chosen) * tokens,
        memory=cost.memory(found, kept, config.token_budget),
        disk=1_000_000,
        based_on=found.text(),
    )


def _result(current: Run, name: str) -> Any:
    path = current.path("checks", f"{name}.json")
    return files.read_json(path) if path.is_file() else None


def _load(config: DiagnoseConfig) -> LoadedModel:
    wide = config.model.model_copy(update={"dtype": "float32"}) if config.model.dtype == "auto" else config.model
    loaded = models.load(wide)
    loaded.model.requires_grad_(True)
    return loaded


def _measure(
    name: str, loaded: LoadedModel | None, rows: Rows, picked: Sequence[int], config: DiagnoseConfig
) -> dict[str, Any]:
    seed = derive_seed(config.seed, name)
    try:
        if name == "double-descent":
            return double_descent(seed=seed)
        assert loaded is not None
        parts = loss_parts(loaded.model, rows, picked, config.token_budget)
        if name == "sharpness":
            return sharpness(loaded.model, rows, picked, config, seed=seed)
        if name == "spectrum":
            return spectrum(loaded.model, parts, config.updates)
        if name == "smoothness":
            return smoothness(loaded.model, parts, config, seed=seed)
        return conditioning(loaded.model)
    except ValueError as error:
        raise DataError(f"diagnose {name}: {error}") from error


def loss_parts(model: Any, rows: Rows, picked: Sequence[int], token_budget: int) -> list[Callable[[], Tensor]]:
    """Functions whose losses sum to the mean loss over the rows' supervised tokens, each a few rows by length."""
    items = [rows.item(i) for i in picked]
    supervised = supervised_tokens(items)

    def part(group: Sequence[int]) -> Tensor:
        batch = {key: t.to(model.device) for key, t in collate([items[i] for i in group]).items()}
        return token_losses(model, batch)[0].sum() / supervised

    return [partial(part, group) for group in token_batches([len(ids) for ids, _ in items], token_budget)]


# --------------------------------------------------------------------------------------------------------------- checks


def sharpness(model: Any, rows: Rows, picked: Sequence[int], config: DiagnoseConfig, *, seed: int) -> dict[str, Any]:
    """Average sharpness of each block and tensor by sampled labels, and the ratios that it proposes."""
    groups = token_batches([int(rows.scan.tokens[i]) for i in picked], config.token_budget)
    named = list(model.named_parameters())
    with progress("sharpness", len(groups), "batches") as bar:

        def losses() -> Iterator[Callable[[], Tensor]]:
            for group in groups:
                batch = rows.batch([picked[i] for i in group], model.device)
                yield lambda batch=batch: token_losses(model, batch)[0].mean()  # type: ignore[misc]
                bar.advance()

        tensors = diagnostics.block_sharpness(losses(), named, block=lambda name: name, seed=seed)
    sizes = {name: p.numel() for name, p in named}
    blocks: dict[str, list[str]] = {}
    for name in tensors:
        blocks.setdefault(optim.block_of(name), []).append(name)
    pooled = {
        block: sum(tensors[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)
        for block, names in blocks.items()
    }
    if not all(math.isfinite(value) for value in pooled.values()):
        raise ValueError("a block's sharpness is not finite; look at the model's weights and the rows")
    positive = {block: value for block, value in pooled.items() if value > 0 and block != "other"}
    return {
        "labels": "sampled",
        "batches": len(groups),
        "blocks": {b: {"sharpness": v, "parameters": sum(sizes[n] for n in blocks[b])} for b, v in pooled.items()},
        "tensors": tensors,
        "ratios": diagnostics.propose_ratios(positive),
    }


def spectrum(model: Any, parts: Sequence[Callable[[], Tensor]], updates: Sequence[str]) -> dict[str, Any]:
    """Spectra of every matrix of the layers, and of the first update that each optimizer would make of it."""
    gradients = _gradients(model, parts)
    matrices = [(name, p) for name, p in model.named_parameters() if _roles(model, name, p)]
    kinds: dict[str, list[tuple[str, dict[str, float]]]] = {kind: [] for kind in ("weights", *updates)}
    layers: list[dict[str, Any]] = []
    with progress("spectra", len(matrices) * len(kinds), "matrices") as bar:
        for name, param in matrices:
            for kind in kinds:
                tensor = param.detach() if kind == "weights" else _first_update(kind, name, param, gradients.get(name))
                for role, matrix in _roles(model, name, tensor) if tensor is not None else []:
                    found = diagnostics.spectrum(matrix)
                    kinds[kind].append((role, found))
                    layers.append({"name": name, "role": role, "of": kind, **found})
                bar.advance()
    return {"roles": {kind: diagnostics.by_role(found) for kind, found in kinds.items()}, "matrices": layers}


def _first_update(optimizer: str, name: str, param: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The direction of the optimizer's first step on this gradient, decay excluded."""
    if gradient is None:
        return None
    map_ = optim.UpdateMap.of(optim.create(optimizer, [(name, param)], lr=1.0), copy=False)
    return map_({name: gradient})[name]


def _gradients(model: Any, parts: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Gradients of the sum of the parts by parameter name; the model's own `.grad` stay as they are."""
    named = list(model.named_parameters())
    total: list[Tensor | None] = [None] * len(named)
    with progress("gradient", len(parts), "batches") as bar:
        for part in parts:
            loss = part()
            if not bool(loss.detach().isfinite()):
                raise ValueError(f"the loss is {float(loss.detach())} on these rows")
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            total = [b if a is None else a if b is None else a.add_(b) for a, b in zip(total, found, strict=True)]
            bar.advance()
    return {name: g for (name, _), g in zip(named, total, strict=True) if g is not None}


def _roles(model: Any, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    return list(diagnostics.roles(name, tensor, heads=heads, kv_heads=kv_heads))


FROBENIUS_PROBES = 3


def smoothness(
    model: Any, parts: Sequence[Callable[[], Tensor]], config: DiagnoseConfig, *, seed: int
) -> dict[str, Any]:
    """|H|_{1,1} / d by Cauchy probes, in the model's coordinates and in rotated ones, against lambda_max and |H|_F."""
    gradients = _gradients(model, parts)
    named = [(name, p) for name, p in model.named_parameters() if name in gradients]
    params = [p for _, p in named]
    start = [gradients.pop(name) for name, _ in named]
    size = sum(p.numel() for p in params)
    whole = config.lanczos_steps * size * 4 <= BASIS_BYTES
    product = diagnostics.hessian(list(parts), params)
    settings: dict[str, Any] = {"probes": config.probes, "coordinates": config.coordinates, "seed": seed}
    total = config.probes * (2 if config.rotate else 1) + config.lanczos_steps + FROBENIUS_PROBES
    with progress("Hessian", total, "products") as bar:
        found: dict[str, Any] = {"plain": diagnostics.linf_smoothness(product, params, **settings, advance=bar.advance)}
        if config.rotate:
            turn = diagnostics.Rotation(derive_seed(seed, "rotation"))
            found["rotated"] = diagnostics.linf_smoothness(
                product, params, **settings, rotation=turn, advance=bar.advance
            )
        found["lanczos"] = diagnostics.lanczos(
            product, start, steps=config.lanczos_steps, reorthogonalize=whole, advance=bar.advance
        ) | {"reorthogonalized": whole}
        found["frobenius"] = diagnostics.frobenius(
            product, params, probes=FROBENIUS_PROBES, seed=seed, advance=bar.advance
        )
    return found


def conditioning(model: Any) -> dict[str, Any]:
    """Condition numbers of every matrix, and the penalty that TSCNC puts on it."""
    named = [(name, p) for name, p in model.named_parameters() if p.ndim >= 2]
    found = []
    with progress("condition numbers", len(named), "matrices") as bar, torch.no_grad():
        for name, param in named:
            for role, matrix in _roles(model, name, param.detach()) or [(optim.block_of(name), param.detach())]:
                penalty = float(diagnostics.condition_penalty(matrix))
                found.append({"name": name, "role": role, "shape": list(matrix.shape), "penalty": penalty,
                              **diagnostics.condition_numbers(matrix)})  # fmt: skip
            bar.advance()
    return {"matrices": found}


DESCENTS: Mapping[str, tuple[str, dict[str, Any], float, int | None]] = {
    "gradient descent": ("sgd", {}, 1.0, None),
    "SGD, batch 8": ("sgd", {}, 0.25, 8),
    "SGD, batch 1": ("sgd", {}, 0.05, 1),
    "momentum 0.9": ("sgd", {"momentum": 0.9}, 0.5, None),
    "Adam": ("adamw", {}, 0.0, None),
    "Muon": ("muon", {}, 0.0, None),
}
"""Name -> (optimizer, its settings, its rate in terms of 1 / lambda_max (0: `FIXED_RATE`), rows a step)."""

FIXED_RATE = 0.02
DESCENT_STEPS = 2000


def double_descent(*, seed: int) -> dict[str, Any]:
    """The experiment of `optim.diagnostics.double_descent`: in closed form, and at the threshold by real optimizers."""
    dd = diagnostics.double_descent
    data = dd.make_data(seed=seed % 2**32)
    threshold = len(data.x)
    with progress("double descent", len(dd.VARIANTS) + len(DESCENTS), "arms") as bar:
        closed = {}
        for variant in dd.VARIANTS:
            closed[variant] = dd.experiment(data, variant=variant)
            bar.advance()
        f, _ = dd.features(data, threshold)
        rate = len(f) / float(torch.linalg.matrix_norm(f, 2)) ** 2
        arms: dict[str, dict[str, float]] = {}
        for name, (optimizer, options, factor, batch) in DESCENTS.items():
            lr = rate * factor or FIXED_RATE

            def make(
                named: list[tuple[str, nn.Parameter]], o: str = optimizer, lr: float = lr, s: Any = options
            ) -> torch.optim.Optimizer:
                return optim.create(o, named, lr=lr, **s)

            train, test = dd.descend(data, threshold, make, steps=DESCENT_STEPS, batch=batch, seed=seed % 2**32)
            arms[name] = {"train_mse": train, "test_mse": test, "lr": lr, "steps": DESCENT_STEPS}
            bar.advance()
    return {"widths": list(dd.WIDTHS), "steps": list(dd.STEPS), "threshold": threshold, "closed": closed, "arms": arms}


def _plain(value: Any) -> Json:
    """For JSON, which has no infinity: what is not finite becomes a text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value
