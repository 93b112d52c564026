"""Steps with states in 8 bits and of low rank: time, state and what a step adds, beside full states and other codes."""

import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optim import RULES, AdamWRule, LionRule, MuonRule, Optimizer
from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio
from tests.benchmarks.step_memory import Make, add_rows
from tests.benchmarks.test_optimizers import llama, made

pytestmark = pytest.mark.bench

MOST = {"adamw_8bit": 2.1, "lion_8bit": 1.1, "muon_8bit": 1.1}
FULL = {"adamw_8bit": AdamWRule(), "lion_8bit": LionRule(), "muon_8bit": MuonRule(nesterov=False)}
PEERS = {"galore": "GaLore", "fira": "Fira", "apollo": "APOLLO"}
RANK = 128


def stepped(name: str, small: bool) -> list[Parameter]:
    """What elementwise rules step is the whole model, what the others step the matrices of three layers."""
    everything = made(llama(small))
    return everything if name in ("adamw_8bit", "lion_8bit") else [p for p in everything[1:28] if p.ndim == 2]


def arms(name: str, report: Report) -> dict[str, Make]:
    """Ours, our rule with its whole state, torch's AdamW, and collected or published codes where they are installed."""
    rule = RULES[name]() if name in FULL else RULES[name](rank=RANK)
    found: dict[str, Make] = {name: lambda ps: Optimizer(ps, rule, lr=1e-4, weight_decay=0.01)}
    if name in FULL:
        found["full state"] = lambda ps: Optimizer(ps, FULL[name], lr=1e-4, weight_decay=0.01)
        if name == "adamw_8bit":
            found["torch fused"] = lambda ps: torch.optim.AdamW(ps, lr=1e-4, weight_decay=0.01, fused=True)
        kind, package = {"adamw_8bit": "AdamW8bit", "lion_8bit": "Lion8bit"}.get(name), "bitsandbytes"
        settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
        groups: dict[str, Any] = {}
    else:
        kind, package = PEERS[name], "pytorch_optimizer"
        settings = {"lr": 1e-4, "weight_decay": 0.01} | ({"scale_type": "channel"} if name == "apollo" else {})
        groups = {
            "rank": RANK,
            "update_proj_gap": 200,
            "scale": 1.0 if name == "apollo" else 0.25,
            "projection_type": "std",
        }
    if kind is None:
        return found
    try:
        module = importlib.import_module("bitsandbytes.optim" if package == "bitsandbytes" else package)
    except ImportError:
        report.notes += [f"{package} is not installed: without its {kind}."]
        return found
    return found | {package: lambda ps: getattr(module, kind)([{"params": ps} | groups], **settings)}


def products(name: str, params: list[Parameter]) -> Callable[[], None]:
    """The products of matrices that the method consists of, alone: no code of it takes less."""
    bases = [torch.randn(min(p.shape), RANK) for p in params]

    def low(g: Tensor, basis: Tensor) -> Tensor:
        return g @ basis if g.shape[0] >= g.shape[1] else basis.mT @ g

    def run() -> None:
        for p, basis in zip(params, bases, strict=True):
            assert p.grad is not None
            found = low(p.grad, basis)
            for _ in range({"galore": 1, "fira": 2, "apollo": 0}[name]):
                found @ basis.mT if p.shape[0] >= p.shape[1] else basis @ found

    return run


def test_compressed(bench: Settings, tmp_path: Path) -> None:
    small = bench.model == "tiny"
    report = Report("compressed", "A step with states in 8 bits and of low rank", bench)
    report.workload = {
        "parameters": sum(p.numel() for p in stepped("adamw_8bit", small)),
        "in matrices": sum(p.numel() for p in stepped("galore", small)),
    }
    for name in [*FULL, *PEERS]:
        params = stepped(name, small)
        optimizers = {label: make(params) for label, make in arms(name, report).items()}
        steps: dict[str, Callable[[], Any]] = {label: optimizer.step for label, optimizer in optimizers.items()}
        if name in PEERS:
            steps["its products"] = products(name, params)
        for step in steps.values():  # makes states and bases, compiles
            step()
        state = optimizers[name].state
        held = sum(t.numel() * t.element_size() for own in state.values() for t in own.values())
        samples = interleaved(steps, bench.times(7), bench.seconds / 6)
        report.add(f"{name}: step", median(samples[name]) * 1e3, "ms")
        for label in list(steps)[1:]:
            report.add(f"{name}: {label}", median(samples[label]) * 1e3, "ms")
            aim = 0.667 if label == "pytorch_optimizer" else None
            report.add(f"{name} / {label}", ratio(samples[name], samples[label]), "x", at_most=aim)
        if "pytorch_optimizer" in samples:
            floor = ratio(samples["its products"], samples["pytorch_optimizer"])
            report.add(f"{name}: its products / pytorch_optimizer", floor, "x")
        parameters = sum(p.numel() for p in params)
        share = held / parameters
        report.add(f"{name}: state", share, "bytes a parameter", at_most=None if small else MOST.get(name))
        labels = list(optimizers)
        report.keep({f"{name}: {label}": times for label, times in samples.items()})
        del optimizers, steps, samples, state
        gc.collect()
        add_rows(report, name, labels, parameters)
    report.notes += [
        f"Low rank: {RANK}, no renewal of a basis in the steps that are timed.",
        "Elementwise rules step the whole model, the others the matrices of three layers. Memory: each arm in a "
        "process of its own, tensors beside parameters and gradients, and the peak of a second step.",
    ]
    report.write(tmp_path)


def test_renewal_of_a_basis(bench: Settings, tmp_path: Path) -> None:
    """What a step costs that renews its basis, beside one that does not: once in 200 steps."""
    shapes = [(64, 64), (64, 160)] if bench.model == "tiny" else [(576, 576), (1536, 576), (576, 1536)]
    params = made(shapes)
    report = Report("low-rank-renewal", "A step of GaLore with and without a new basis", bench)
    report.workload = {"shapes": shapes}
    arms: dict[str, Callable[[], Any]] = {}
    for label, gap in (("with a new basis", 1), ("without", 10**9)):
        arms[label] = Optimizer(params, RULES["galore"](rank=RANK, update_proj_gap=gap), lr=1e-4).step
        arms[label]()
    samples = interleaved(arms, bench.times(7), bench.seconds / 6)
    for label in arms:
        report.add(f"step {label}", median(samples[label]) * 1e3, "ms")
    extra = (median(samples["with a new basis"]) - median(samples["without"])) / 200
    report.add("of a step, spread over 200", extra / median(samples["without"]), "x")
    report.keep(samples)
    report.write(tmp_path)
