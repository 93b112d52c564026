"""Newton-Schulz beside plain products of matrices, steps of Muon beside other Muons, stacks beside one by one."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from optim import OPTIMIZERS, MuonRule, Optimizer, backend, stacks
from optim.linalg import newton_schulz
from optim.rules.matrices import MatrixOptimizer
from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio
from tests.benchmarks.step_memory import Make, add_rows
from tests.benchmarks.test_optimizers import llama, made

pytestmark = pytest.mark.bench


def flop(stack: Tensor, steps: int = 5) -> float:
    """Of Newton-Schulz on [k, m, n], as if no product were symmetric."""
    p, q = sorted(stack.shape[-2:])
    return len(stack) * steps * (4.0 * p * p * q + 2.0 * p**3)


def test_newton_schulz(bench: Settings, tmp_path: Path) -> None:
    """The rate of a stack, of which products of matrices are most; aim: 0.8 of the rate of large products."""
    report = Report("newton-schulz", "Newton-Schulz of stacks, in float32, beside torch's products of matrices", bench)
    small = bench.model == "tiny"
    sides = [(64, 64), (64, 160)] if small else [(576, 576), (576, 1536)]
    side = 256 if small else 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    for m, n in sides:
        stack = torch.randn(12 if m == n else 6, m, n)
        halves = stack.to(torch.bfloat16)
        wide = stack / torch.linalg.matrix_norm(stack, keepdim=True)
        gram = wide @ wide.mT

        def products(wide: Tensor = wide, gram: Tensor = gram) -> None:
            """The products of five steps alone."""
            for _ in range(5):
                wide @ wide.mT
                gram @ gram
                gram @ wide

        arms: dict[str, Callable[[], Any]] = {
            "stack": lambda stack=stack: newton_schulz(stack),
            "one by one": lambda stack=stack: [newton_schulz(x) for x in stack],
            "its products": products,
            "large product": lambda: a @ b,
        }
        if small:
            arms["stack, bfloat16"] = lambda halves=halves: newton_schulz(halves)
        for arm in arms.values():
            arm()
        samples = interleaved(arms, bench.times(15), bench.seconds / 4)
        label = f"{len(stack)} x {m} x {n}"
        large = 2.0 * side**3
        for name, list_ in samples.items():
            work = large if name == "large product" else flop(stack)
            report.add(f"{label}: {name}", work / median(list_) / 1e9, "GFLOP/s")
        share = 1 / ratio(samples["stack"], samples["large product"], scale=large / flop(stack))
        report.add(f"{label}: stack / large product", share, "of its rate", at_least=0.8)
        share = 1 / ratio(samples["stack"], samples["its products"])
        report.add(f"{label}: stack / its products", share, "of their rate")
        report.keep({f"{label}: {name}": list_ for name, list_ in samples.items()})
    report.workload = {"shapes": sides, "large product": side}
    report.notes.append("FLOP are those of dense products: 5 (4 p^2 q + 2 p^3) a matrix.")
    report.write(tmp_path)


def stepped(name: str, small: bool) -> list[Parameter]:
    """The matrices of three layers."""
    return [p for p in made(llama(small))[1:28] if p.ndim == 2]


def arms(name: str, report: Report) -> dict[str, Make]:
    """Muon of ours, of torch and, where it is installed, of pytorch-optimizer."""
    found: dict[str, Make] = {
        "muon": lambda ps: Optimizer(ps, MuonRule(), lr=1e-4, weight_decay=0.01),
        "float32": lambda ps: Optimizer(ps, MuonRule(ns_dtype="float32"), lr=1e-4, weight_decay=0.01),
        "torch": lambda ps: torch.optim.Muon(ps, lr=1e-4, weight_decay=0.01),
    }
    try:
        peer = importlib.import_module("pytorch_optimizer").Muon
    except ImportError:
        report.notes.append("pytorch-optimizer is not installed.")
        return found
    return found | {
        "pytorch-optimizer": lambda ps: peer([{"params": ps, "use_muon": True}], lr=1e-4, weight_decay=0.01)
    }


def test_muon(bench: Settings, tmp_path: Path) -> None:
    """A step of the matrices of three layers; aims: no slower than torch.optim.Muon, 1.5 times as fast as the peer."""
    params = stepped("muon", bench.model == "tiny")
    report = Report("muon", f"A step of Muon on {len(params)} matrices of three layers", bench)
    report.workload = {"tensors": len(params), "parameters": sum(p.numel() for p in params)}
    steps: dict[str, Callable[[], Any]] = {label: make(params).step for label, make in arms("muon", report).items()}
    halves = [p.grad.to(torch.bfloat16) for p in params if p.grad is not None]
    steps["Newton-Schulz in bfloat16 alone"] = lambda: [newton_schulz(x) for x in halves]
    for step in steps.values():
        step()
    samples = interleaved(steps, bench.times(7), bench.seconds / 2)
    for name, list_ in samples.items():
        report.add(f"{name}: step", median(list_) * 1e3, "ms")
    for name, aim in (("torch", 1.0), ("pytorch-optimizer", 1 / 1.5), ("Newton-Schulz in bfloat16 alone", None)):
        if name in samples:
            report.add(f"muon / {name}", ratio(samples["muon"], samples[name]), "x", at_most=aim and round(aim, 3))
    report.add("muon, float32 / muon", ratio(samples["float32"], samples["muon"]), "x")
    add_rows(report, "muon", [name for name in steps if name in arms("muon", report)], report.workload["parameters"])
    has = "has" if backend.CPU_MULTIPLIES_BFLOAT16 else "lacks"
    report.notes.append(
        "torch and pytorch-optimizer multiply in bfloat16; ours does on GPUs and on CPUs that have "
        f"instructions for it, which this one {has}."
    )
    report.keep(samples)
    report.write(tmp_path)


@pytest.mark.parametrize("side", [8, 64, 256])
def test_stacks(side: int, bench: Settings, tmp_path: Path) -> None:
    """Many small matrices of one shape, stepped in stacks and one by one."""
    count = 20 if bench.model == "tiny" else (1 << 20) // side**2
    params = [Parameter(0.02 * torch.randn(side, side)) for _ in range(count)]
    for p in params:
        p.grad = 0.01 * torch.randn(side, side)
    title = f"A step of {count:,} matrices of {side} x {side}, in stacks and one by one"
    report = Report(f"stacks-{side}", title, bench)
    for name in sorted(name for name, cls in OPTIMIZERS.items() if issubclass(cls, MatrixOptimizer)):
        default = OPTIMIZERS[name]([(f"layers.{i}.weight", p) for i, p in enumerate(params)], lr=1e-4)

        def one_by_one(default: Optimizer = default) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stacks, "LIMIT", 1)
                default.step()

        default.step()
        samples = interleaved({"stacks": default.step, "one by one": one_by_one}, bench.times(5), bench.seconds / 20)
        for arm, list_ in samples.items():
            report.add(f"{name}: {arm}", median(list_) * 1e3, "ms")
        report.add(f"{name}: stacks / one by one", ratio(samples["stacks"], samples["one by one"]), "x")
        report.keep({f"{name}: {arm}": list_ for arm, list_ in samples.items()})
    report.workload = {"matrices": count, "side": side, "limit": stacks.CPU_LIMIT}
    report.write(tmp_path)
