"""The feature store against a bare numpy memmap of the same bytes: writing, scanning, scoring."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from datatools import GradientFeatures, files, influence
from tests.benchmarks.measure import Report, Sample, Settings, interleaved, median, ratio

pytestmark = pytest.mark.bench

DIM = 8192
TARGETS = 32
SCAN = 4096  # rows read at a time, `iter_blocks`' own default


class Job:
    """`n` rows of `DIM` numbers in one dtype, as a store and as a memmap."""

    def __init__(self, folder: Path, n: int, dtype: str) -> None:
        self.folder, self.n, self.dtype = folder, n, dtype
        self.keys = [files.digest(str(i).encode()) for i in range(n)]
        self.step = len(self.store("plan").unit_keys(0))  # rows of a unit: what both sides write at a time
        generator = torch.Generator().manual_seed(0)
        self.pieces = [torch.randn(self.step, DIM, generator=generator) for _ in range(3)]
        self.targets = torch.nn.functional.normalize(torch.randn(TARGETS, DIM, generator=generator))
        self.bytes = n * DIM * (2 if dtype == "float16" else 1)

    def store(self, name: str) -> GradientFeatures:
        return GradientFeatures.create_or_open(self.folder / name, meta={}, dim=DIM, dtype=self.dtype, keys=self.keys)

    def piece(self, unit: int, count: int) -> Tensor:
        return self.pieces[unit % len(self.pieces)][:count]

    # the store

    def write(self) -> None:
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        store = self.store("store")
        for unit in store.missing_units():
            store.write_unit(unit, self.piece(unit, len(store.unit_keys(unit))))

    def scan(self, *, verify: bool) -> float:
        store = GradientFeatures.open(self.folder / "store", verify=verify)
        return float(sum(block.features[:, 0].sum() for block in store.iter_blocks(SCAN)))

    def score(self) -> Tensor:
        return influence([GradientFeatures.open(self.folder / "store", verify=False)], [self.targets], [1.0])

    # the memmap: no digests, no units, nothing that survives a kill

    def raw(self, mode: str) -> NDArray[np.generic]:
        element = np.float16 if self.dtype == "float16" else np.int8
        return np.memmap(self.folder / "raw.bin", element, mode, shape=(self.n, DIM))  # type: ignore[call-overload]

    def raw_write(self) -> None:
        (self.folder / "raw.bin").unlink(missing_ok=True)
        out, scale = self.raw("w+"), np.zeros((self.n, 1), np.float32)
        for unit, start in enumerate(range(0, self.n, self.step)):
            rows = self.piece(unit, min(self.step, self.n - start)).numpy()
            part = slice(start, start + len(rows))
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            if self.dtype == "int8":
                scale[part] = np.abs(rows).max(1, keepdims=True) / 127
                rows = np.rint(rows / scale[part])
            out[part] = rows
        out.flush()  # type: ignore[attr-defined]
        with open(self.folder / "raw.bin", "rb") as file:
            os.fsync(file.fileno())
        np.save(self.folder / "scale.npy", scale)

    def raw_blocks(self) -> Iterator[NDArray[np.float32]]:
        rows, scale = self.raw("r"), np.load(self.folder / "scale.npy")
        for start in range(0, self.n, SCAN):
            part = slice(start, start + SCAN)
            block = rows[part].astype(np.float32)
            yield block * scale[part] if self.dtype == "int8" else block

    def raw_scan(self) -> float:
        return float(sum(block[:, 0].sum() for block in self.raw_blocks()))

    def raw_score(self) -> Tensor:
        return torch.cat([torch.from_numpy(block) @ self.targets.T for block in self.raw_blocks()])


def test_store(bench: Settings, tmp_path: Path) -> None:
    n = bench.size(20_000, 1_000)
    jobs = {dtype: Job(tmp_path / dtype, n, dtype) for dtype in ("float16", "int8")}
    report = Report("store", "Feature store against a numpy memmap", bench)
    report.workload = {
        "rows": n,
        "numbers a row": DIM,
        "targets": TARGETS,
        "rows a unit": jobs["int8"].step,
        "rows read at a time": SCAN,
    }
    for dtype, job in jobs.items():
        job.write()
        job.raw_write()
        torch.testing.assert_close(job.score(), job.raw_score(), rtol=1e-2, atol=2e-4)  # right, before it is timed
        samples = interleaved(
            {
                "store write": job.write,
                "memmap write": job.raw_write,
                "store scan, digests checked": lambda job=job: job.scan(verify=True),
                "store scan": lambda job=job: job.scan(verify=False),
                "memmap scan": job.raw_scan,
                "store score": job.score,
                "memmap score": job.raw_score,
            },
            bench.times(5),
            bench.seconds / len(jobs),
        )
        fill(report, job, samples)
        report.keep({f"{dtype}: {name}": list_ for name, list_ in samples.items()})
        shutil.rmtree(job.folder)
    report.notes += [
        "MB is 10^6 stored bytes. write: raw float32 rows to durable bytes on disk, both sides normalise and convert; "
        "the store also computes norms, statuses and digests, and calls fsync for every unit, the memmap once.",
        "scan: every row back as float32 in blocks; the store also scales rows to unit length again. Files are in the "
        "page cache: these are costs of a processor, not of a disk.",
        f"score: all rows against {TARGETS} float32 targets; the store by `influence`, keys matched, the memmap as one "
        "product a block.",
    ]
    report.write(tmp_path)


def fill(report: Report, job: Job, samples: dict[str, list[Sample]]) -> None:
    dtype, megabytes = job.dtype, job.bytes / 1e6
    for name in ("store write", "memmap write", "store scan, digests checked", "store scan", "memmap scan"):
        report.add(f"{dtype}: {name}", megabytes / median(samples[name]), "MB/s")
    for name in ("store score", "memmap score"):
        report.add(f"{dtype}: {name}", job.n / median(samples[name]), "rows/s")
    for ours, base in (("store write", "memmap write"), ("store scan", "memmap scan"), ("store score", "memmap score")):
        report.add(f"{dtype}: time of {ours} / {base}", ratio(samples[ours], samples[base]), "x")
    report.add(
        f"{dtype}: what checking digests adds to a scan",
        100 * (ratio(samples["store scan, digests checked"], samples["store scan"]) - 1),
        "%",
    )
