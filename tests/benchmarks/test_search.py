"""Exact scores of stored rows against several targets, by dtype, next to the bare matrix product and to reading."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from datatools import GradientFeatures, files, influence
from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio

pytestmark = pytest.mark.bench

DIM, TARGETS = 8192, 256
DTYPES = ("float16", "int8", "int4", "int1")
BLOCK = 1024


def test_search(bench: Settings, tmp_path: Path) -> None:
    """The bound is the larger of the float32 product of rows in memory and of reading the bytes of the store."""
    n = bench.size(16_384, 2_048)
    generator = torch.Generator().manual_seed(0)
    targets = torch.nn.functional.normalize(torch.randn(TARGETS, DIM, generator=generator))
    piece = torch.randn(BLOCK, DIM, generator=generator)
    keys = [files.digest(str(row).encode()) for row in range(n)]
    report = Report("search", "Scores of stored rows against 256 targets", bench)
    report.workload = {"rows": n, "numbers a row": DIM, "targets": TARGETS}
    exact = influence([piece], [targets], [1.0])

    def product() -> None:
        for start in range(0, n, BLOCK):
            piece[: n - start] @ targets.T

    for dtype in DTYPES:
        folder = tmp_path / dtype
        store = GradientFeatures.create_or_open(folder, meta={}, dim=DIM, dtype=dtype, keys=keys, rows_per_unit=BLOCK)
        for unit in store.missing_units():
            store.write_unit(unit, piece[: store.unit_rows(unit)])
        store = GradientFeatures.open(folder, verify=False)
        score = partial(influence, [store], [targets], [1.0], keys=keys)

        def read(folder: Path = folder) -> None:
            for path in folder.glob("*.safetensors"):
                path.read_bytes()

        samples = interleaved({"product": product, "read": read, "score": score}, bench.times(5), bench.seconds / 4)
        found = score()[:BLOCK]
        report.add(f"{dtype}: rows per second", n / median(samples["score"]), "rows/s")
        report.add(f"{dtype}: product / score", ratio(samples["product"], samples["score"]), "x")
        report.add(f"{dtype}: reading / score", ratio(samples["read"], samples["score"]), "x")
        report.add(f"{dtype}: bytes per row", sum(p.stat().st_size for p in folder.glob("*.safetensors")) / n, "bytes")
        both = torch.corrcoef(torch.stack([found.flatten(), exact[: len(found)].flatten()]))
        report.add(f"{dtype}: correlation with scores that are not quantized", float(both[0, 1]), "")
        report.keep({f"{dtype}: {name}": list_ for name, list_ in samples.items()})
        shutil.rmtree(folder)
    report.notes.append(
        "Stored rows are decoded to float32 in blocks that stay in the cache, so that the bound of every dtype is the "
        "float32 product; the rows are random, which is the hardest case for few bits. Files are in the page cache."
    )
    report.write(tmp_path)
