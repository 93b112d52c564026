"""Steps with states in 8 bits and of low rank: time, state and what a step adds, beside full states and other codes."""

import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from optim import RULES, AdamWRule, LionRule, MuonRule, Optimizer
from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio
from tests.benchmarks.test_optimizers import llama, made, peak_bytes

pytestmark = pytest.mark.bench

Make = Callable[[list[Parameter]], torch.optim.Optimizer]
MOST = {"adamw_8bit": 2.1, "lion_8bit": 1.1, "muon_8bit": 1.1}
FULL = {"adamw_8bit": AdamWRule(), "lion_8bit": LionRule(), "muon_8bit": MuonRule(nesterov=False)}
PEERS = {"galore": "GaLore", "fira": "Fira", "apollo": "APOLLO"}
RANK = 128


def peers(name: str, report: Report) -> dict[str, Make]:
    """Our rule with its whole state, torch's AdamW, and published or collected codes, where they are installed."""
    if name in FULL:
        found: dict[str, Make] = {"full state": lambda ps: Optimizer(ps, FULL[name], lr=1e-4, weight_decay=0.01)}
        if name == "adamw_8bit":
            found["torch fused"] = lambda ps: torch.optim.AdamW(ps, lr=1e-4, weight_decay=0.01, fused=True)
        kind, package = {"adamw_8bit": "AdamW8bit", "lion_8bit": "Lion8bit"}.get(name), "bitsandbytes"
        settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
        groups: dict[str, Any] = {}
    else:
        found, kind, package = {}, PEERS[name], "pytorch_optimizer"
        settings = {"lr": 1e-4} | ({"scale_type": "channel"} if name == "apollo" else {})
        groups = {"rank": RANK, "update_proj_gap": 200, "scale": 1.0 if name == "apollo" else 0.25,
                  "projection_type": "std"}
    if kind is None:
        return found
    try:
        module = importlib.import_module("bitsandbytes.optim" if package == "bitsandbytes" else package)
    except ImportError:
        report.notes += [f"{package} is not installed: without its {kind}."]
        return found
    return found | {package: lambda ps: getattr(module, kind)([{"params": ps} | groups], **settings)}


def test_compressed(bench: Settings, tmp_path: Path) -> None:
    """Elementwise rules step the whole model, the others the matrices of three layers."""
    small = bench.model == "tiny"
    everything = made(llama(small))
    layers = [p for p in everything[1:28] if p.ndim == 2]
    report = Report("compressed", "A step with states in 8 bits and of low rank", bench)
    report.workload = {"parameters": sum(p.numel() for p in everything), "in matrices": sum(p.numel() for p in layers)}
    for name in [*FULL, *PEERS]:
        params = everything if name in ("adamw_8bit", "lion_8bit") else layers
        rule = RULES[name]() if name in FULL else RULES[name](rank=RANK)
        ours = Optimizer(params, rule, lr=1e-4, weight_decay=0.01)
        arms: dict[str, Callable[[], Any]] = {name: ours.step}
        arms |= {label: make(params).step for label, make in peers(name, report).items()}
        for arm in list(arms.values()):  # makes states and bases, compiles
            arm()
        held = sum(t.numel() * t.element_size() for state in ours.state.values() for t in state.values())
        grown = peak_bytes(ours.step)
        samples = interleaved(arms, bench.times(7), bench.seconds / 6)
        report.add(f"{name}: step", median(samples[name]) * 1e3, "ms")
        for label in list(arms)[1:]:
            report.add(f"{name}: {label}", median(samples[label]) * 1e3, "ms")
            aim = 0.667 if label == "pytorch_optimizer" else None
            report.add(f"{name} / {label}", ratio(samples[name], samples[label]), "x", at_most=aim)
        share = held / sum(p.numel() for p in params)
        report.add(f"{name}: state", share, "bytes a parameter", at_most=None if small else MOST.get(name))
        if grown is not None:
            report.add(f"{name}: memory that a step adds", grown / 2**20, "MiB")
        report.keep({f"{name}: {label}": times for label, times in samples.items()})
        del ours, arms, samples
        gc.collect()
    report.notes += [f"Low rank: {RANK}, no renewal of a basis in the steps that are timed."]
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
