"""Triton kernels on a GPU: right, then timed beside torch's operations and the predictions of `kernels.py`.

`python -m pytest tests/benchmarks/test_kernels.py -m "bench and gpu" -s`; without a GPU there is nothing to measure.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datatools.projectors import SJLT
from optim import AdamW, AdamW8bit, AdamWRule, UpdateMap, linalg
from optim.zeroth_order import noise
from tests.benchmarks.measure import Report, Settings

pytestmark = [pytest.mark.bench, pytest.mark.gpu]


def arms(device: torch.device, scale: int) -> list[tuple[str, Callable[[], Tensor], tuple[str, str] | None, float]]:
    """(name, call that returns what it made, (name, size) of its prediction, how far kernel and torch may be apart).

    scale: every size is divided by it; predictions hold at 1.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def stepping(kind: type, dtype: torch.dtype, **kwargs: object) -> Callable[[], Tensor]:
        n = 134_515_008 // scale**2
        params = [torch.nn.Parameter(drawn(n // 16, dtype=dtype)) for _ in range(16)]
        optimizer = kind(params, lr=1e-3, weight_decay=0.1, **kwargs)
        for p in params:
            p.grad = drawn(n // 16, dtype=dtype)

        def step() -> Tensor:
            optimizer.step()
            return params[0].detach()

        return step

    side, rows = 4096 // scale, 16
    square, stack = drawn(side, side), drawn(90 // scale + 1, 576 // scale, 1536 // scale, dtype=torch.bfloat16)
    weights = {d: torch.zeros(134_515_008 // scale**2, dtype=d, device=device) for d in (torch.float32, torch.bfloat16)}
    coordinates = (1 << 20) // scale**2
    grads = drawn(rows, coordinates)
    rule = AdamWRule()
    param = torch.zeros(coordinates, device=device)
    state = {"step": torch.tensor(9.0), "exp_avg": drawn(coordinates), "exp_avg_sq": drawn(coordinates).square()}
    updates, projector = UpdateMap({"w": rule}, {"w": state}, {"w": param}), SJLT(dim=8192)

    def perturbed(dtype: torch.dtype) -> Tensor:
        noise.add_normal_(weights[dtype], 1e-3, 7)
        return torch.zeros(1)  # another stream than torch's generator: nothing to compare

    def projected() -> Tensor:
        out = torch.zeros(rows, 8192, device=device)
        projector.accumulate_updates(out, updates, "w", grads)
        return out

    whole = "all of SmolLM2-135M"
    return [
        ("AdamW, float32", stepping(AdamW, torch.float32), ("AdamW, float32", whole), 1e-5),
        (
            "AdamW, bfloat16, stochastic rounding",
            stepping(AdamW, torch.bfloat16, stochastic_rounding=True),
            ("AdamW, bfloat16, stochastic rounding", whole),
            1e-1,
        ),
        ("8-bit AdamW, float32", stepping(AdamW8bit, torch.float32), ("8-bit AdamW, float32", whole), 1e-4),
        (
            "Newton-Schulz, 5 steps, 4096 x 4096",
            lambda: linalg.newton_schulz(square.bfloat16()),
            ("Newton-Schulz, 5 steps, bfloat16", "4096 x 4096"),
            0.1,
        ),
        (
            "Newton-Schulz, 5 steps, 90 x 576 x 1536",
            lambda: linalg.newton_schulz(stack),
            ("Newton-Schulz, 5 steps, bfloat16", "90 x 576 x 1536"),
            0.1,
        ),
        (
            "rows to unit RMS",
            lambda: linalg.unit_rms(square, dim=-1, eps=1e-8),
            ("rows to unit RMS, float32", "4096 x 4096"),
            1e-5,
        ),
        (
            "columns to unit RMS",
            lambda: linalg.unit_rms(square, dim=-2, eps=1e-8),
            ("columns to unit RMS, float32", "4096 x 4096"),
            1e-5,
        ),
        (
            "SJLT of Adam's directions",
            projected,
            ("SJLT of Adam's directions, float32", "16 rows of 2^20 to 8192"),
            1e-3,
        ),
        ("perturbation, float32", lambda: perturbed(torch.float32), ("perturbation, float32", whole), 0.0),
        ("perturbation, bfloat16", lambda: perturbed(torch.bfloat16), ("perturbation, bfloat16", whole), 0.0),
    ]


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median over repetitions, by the GPU's own clock."""
    times = []
    for _ in range(3):
        call()
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def both(device: torch.device, scale: int, by_kernel: str) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Name -> the call with its kernel and by torch, from the same start; each is first run once and compared."""
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {}
    results: dict[str, dict[str, Tensor]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for way, chosen in (("kernel", by_kernel), ("torch", "torch")):
            patch.setenv("OPTIM_BACKEND", chosen)
            for name, call, _, tolerance in arms(device, scale):
                calls.setdefault(name, {})[way] = call
                results.setdefault(name, {})[way] = call().float().clone()
                if way == "torch":
                    got, want = results[name]["kernel"], results[name]["torch"]
                    apart = (got - want).norm() / want.norm().clamp(min=1e-30)
                    assert apart <= tolerance or not want.any(), f"{name}: {apart:.3g} apart"
    return calls


def test_kernels(bench: Settings, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from tests.benchmarks.kernels import predicted, works

    device, scale = torch.device("cuda", 0), 1 if bench.model == "smollm2" else 8
    expected = {(work.name, work.size): predicted(work.counts)[0] for work in works()}
    report = Report("kernels_gpu", f"Triton kernels on {torch.cuda.get_device_name(device)}", bench)
    calls = both(device, scale, "auto")
    for name, _, row, _ in arms(device, 64):
        spent = {}
        for way, chosen in (("kernel", "auto"), ("torch", "torch")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPTIM_BACKEND", chosen)
                spent[way] = seconds(calls[name][way], bench.times(30))
        report.add(f"{name}: kernel", 1e6 * spent["kernel"], "us")
        report.add(f"{name}: torch's operations", 1e6 * spent["torch"], "us")
        if row is not None and scale == 1:
            report.add(f"{name}: predicted for an H100", 1e6 * expected[row], "us")
    report.write(tmp_path)
