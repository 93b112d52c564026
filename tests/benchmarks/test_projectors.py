"""What it costs to project a million gradient coordinates of eight rows to 8192 numbers."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datatools import PROJECTORS, Projector
from tests.benchmarks.measure import Report, Settings, interleaved, median

pytestmark = pytest.mark.bench

ROWS = 8
DIM = 8192
SHARE = 128  # dense products are timed on this fraction of the coordinates
HIDDEN, KEYS, LAYERS, RANK = 576, 192, 30, 8  # the LoRA matrices of SmolLM2-135M on q, k, v, o


def lora_shapes(layers: int) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for name, out in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            shapes |= {f"{layer}.{name}.A": (RANK, HIDDEN), f"{layer}.{name}.B": (out, RANK)}
    return shapes


def keeps_lengths(projector: Projector, grads: dict[str, Tensor]) -> None:
    """Right, before it is timed: squared lengths to within a few of their standard deviations, |x|^2 sqrt(2 / dim)."""
    squares = sum(g.flatten(1).square().sum(1) for g in grads.values())
    got = projector.project(grads).square().sum(1)
    torch.testing.assert_close(got / squares, torch.ones(ROWS), rtol=0, atol=6 * (2 / DIM) ** 0.5)


def test_projectors(bench: Settings, tmp_path: Path) -> None:
    n = 1 << (20 if bench.model == "smollm2" else 15)
    part = n // SHARE
    generator = torch.Generator().manual_seed(0)
    whole = {"w": torch.randn(ROWS, n // 256, 256, generator=generator)}
    piece = {"w": torch.randn(ROWS, part // 256, 256, generator=generator)}
    shapes = lora_shapes(LAYERS if bench.model == "smollm2" else 2)
    many = {name: torch.randn(ROWS, *shape, generator=generator) for name, shape in shapes.items()}
    coordinates = sum(g[0].numel() for g in many.values())
    sjlt, rademacher = PROJECTORS["sjlt"](dim=DIM), PROJECTORS["rademacher"](dim=DIM)
    for projector, grads in ((sjlt, whole), (sjlt, many), (rademacher, piece)):
        keeps_lengths(projector, grads)
    signs = torch.randint(0, 2, (part, DIM), generator=generator).float().mul_(2).sub_(1)
    seeds = itertools.count(1)
    source, target = torch.zeros(1 << 26), torch.zeros(1 << 26)

    arms: dict[str, tuple[Callable[[], object], float]] = {
        # name -> (what is timed, factor to n coordinates)
        "SJLT": (lambda: sjlt.project(whole), 1),
        "SJLT, first use of each matrix": (lambda: PROJECTORS["sjlt"](dim=DIM, seed=next(seeds)).project(whole), 1),
        f"SJLT, {len(many)} LoRA matrices": (lambda: sjlt.project(many), n / coordinates),
        "Rademacher": (lambda: rademacher.project(piece), SHARE),
        "product with signs already made": (lambda: piece["w"].flatten(1) @ signs, SHARE),
        "copy of 256 MiB": (lambda: target.copy_(source), 1),
    }
    report = Report("projectors", f"Projection of {n:,} coordinates of {ROWS} rows to {DIM} numbers", bench)
    arms |= sklearn_arms(report, whole["w"].flatten(1), n)
    samples = interleaved({name: arm for name, (arm, _) in arms.items()}, bench.times(5), bench.seconds)

    report.workload = {
        "rows": ROWS,
        "coordinates": n,
        "numbers a feature": DIM,
        "coordinates of the dense arms": part,
        "coordinates of the LoRA matrices": coordinates,
    }
    bandwidth = 2 * source.nbytes / min(sample.seconds for sample in samples["copy of 256 MiB"])
    touched = whole["w"].nbytes + 12 * n + 2 * 4 * ROWS * DIM
    for name, (_, factor) in arms.items():
        if not name.startswith("copy"):
            report.add(name, factor * median(samples[name]) * 1e3, "ms")
    report.add("bytes bound of SJLT: gradients, hashes and features moved once", touched / bandwidth * 1e3, "ms")
    report.add("SJLT / bytes bound", median(samples["SJLT"]) / (touched / bandwidth), "x")
    report.add(
        "Rademacher / SJLT",
        SHARE
        * statistics.median(a.seconds / b.seconds for a, b in zip(samples["Rademacher"], samples["SJLT"], strict=True)),
        "x",
    )
    report.add("memory bandwidth, copy", bandwidth / 1e9, "GB/s")
    report.notes += [
        f"All times are for {n:,} coordinates of {ROWS} rows. The dense arms (Rademacher, product) ran on 1/{SHARE} of "
        "them, the LoRA matrices on their own number; their times are scaled up, for cost is linear in coordinates.",
        "SJLT: hashes cached, as after the first batch of a run. Its bound: 4 bytes a gradient coordinate, 12 a hash "
        "(int64 bucket, float32 sign), the features read and written, at the speed of a large copy.",
    ]
    report.keep(samples)
    report.write(tmp_path)


def sklearn_arms(report: Report, x: Tensor, n: int) -> dict[str, tuple[Callable[[], object], float]]:
    """scikit-learn's sparse random projection, at its own density and at one non-zero a coordinate as SJLT has."""
    from sklearn.random_projection import SparseRandomProjection

    rows = x.numpy()
    arms: dict[str, tuple[Callable[[], object], float]] = {}
    for label, density in (("its own density", "auto"), ("one non-zero a coordinate", 1 / DIM)):
        started = time.perf_counter()
        with warnings.catch_warnings():  # that 8192 numbers are more than rows need
            warnings.simplefilter("ignore")
            fitted = SparseRandomProjection(DIM, density=density, random_state=0).fit(rows)
        report.add(f"scikit-learn, {label}: making the matrix, once", (time.perf_counter() - started) * 1e3, "ms")
        per_coordinate = fitted.components_.nnz / n
        arms[f"scikit-learn, {label} ({per_coordinate:.3g} non-zeros a coordinate)"] = (
            lambda fitted=fitted: fitted.transform(rows),
            1,
        )
    return arms
