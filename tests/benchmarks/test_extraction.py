"""What a row of gradient features costs, against plain training, against arithmetic, against the published way."""

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from datatools import GradientFeatures, batch_rows
from pipelines.models.losses import collate, row_losses, token_losses
from tests.benchmarks.measure import Report, Sample, Settings, interleaved, median, number, ratio
from tests.benchmarks.workload import DIM, TOKEN_BUDGET, Workload, folder_bytes, pool_name, prepared

pytestmark = pytest.mark.bench

BATCH = 8  # rows of a plain training batch
BUFFER = 16  # rows that the published code projects at a time
BLOCK = 128  # columns of its projection matrix made at a time
TRIES = 5  # of each matrix product a repetition; the best counts


def test_extraction(bench: Settings, tmp_path: Path) -> None:
    work = prepared(bench, tmp_path, rows=bench.size(48, 24))
    same_numbers(work)
    few = spread(work, bench.size(48, 24) // 6)
    blocks = number("DATATOOLS_BENCH_BLOCKS") or 4
    bound = Bound(work)
    runs = iter(range(10**6))
    folder = tmp_path / "stores"
    samples = interleaved(
        {
            "extraction": lambda: work.extract(folder / str(next(runs))),
            "plain, file order": lambda: plain(work, in_order=True),
            "plain, sorted by length": lambda: plain(work, in_order=False),
            "one by one, dense signs": lambda: one_by_one(work, few, blocks),
            "matrix products": bound.measure,
        },
        bench.times(3),
        bench.seconds,
    )
    report = Report("extraction", "Gradient features of LoRA rows: seconds, and against three yardsticks", bench)
    report.workload = {
        "rows from": pool_name(bench),
        **work.described(),
        **bound.described(),
        "rows of the dense arm": len(few),
        "their tokens": sum(len(ids) for ids, _ in few),
        "sign columns measured": min(blocks * BLOCK, DIM),
    }
    fill(report, work, samples, bound, few)
    report.add("stored bytes a row, everything included", folder_bytes(folder / "0") / len(work.first), "bytes")
    report.keep(samples)
    report.write(tmp_path)


def fill(report: Report, work: Workload, samples: dict[str, list[Sample]], bound: "Bound", few: list[Any]) -> None:
    rows, ours = len(work.first), samples["extraction"]
    for name in ("extraction", "plain, file order", "plain, sorted by length"):
        report.add(f"{name}: seconds a row", median(samples[name]) / rows, "s")
        report.add(f"{name}: tokens a second", work.tokens / median(samples[name]), "tokens/s")
    dense = [dense_seconds(sample.value) for sample in samples["one by one, dense signs"]]
    report.add("one by one, dense signs: seconds a row", statistics.median(dense), "s")
    report.add("extraction / plain, file order", ratio(ours, samples["plain, file order"]), "x", at_most=0.9)
    cpu = [a.cpu_seconds / b.cpu_seconds for a, b in zip(ours, samples["plain, file order"], strict=True)]
    report.add("extraction / plain, file order, in CPU seconds", statistics.median(cpu), "x")
    report.add("extraction / plain, sorted by length", ratio(ours, samples["plain, sorted by length"]), "x")
    report.add("arithmetic bound: seconds a row", bound.seconds() / rows, "s")
    report.add("extraction / arithmetic bound", median(ours) / bound.seconds(), "x", at_most=1.5)
    paired = [a.seconds / bound.seconds(b.value) for a, b in zip(ours, samples["matrix products"], strict=True)]
    report.add("extraction / bound at the speed of its own repetition", statistics.median(paired), "x")
    faster = [b / (a.seconds / rows) for a, b in zip(ours, dense, strict=True)]
    report.add("one by one, dense signs / extraction", statistics.median(faster), "x", at_least=6)
    for part in ours[0].value:
        share = statistics.median(sample.value[part] / sum(sample.value.values()) for sample in ours)
        report.add(f"share of extraction: {part}", 100 * share, "%")
    report.notes += [
        "extraction: `datatools.extract`, hooks, Adam's direction of each row, SJLT, fp16 store with its digests and "
        "fsyncs; rows are read from disk and encoded again (part `fetch`), as in a run. `forward + backward` holds the "
        "products that make each row's gradient.",
        f"plain: model.train(), batches of {BATCH} rows padded with an attention mask, model(labels=...).loss, "
        "backward into the LoRA matrices; rows encoded beforehand, no optimizer step.",
        "arithmetic bound: 2 x weights of the layers x tokens forward, the same for activation gradients, and the head "
        "forward and back at answer tokens only, without padding, attention scores or adapters, at the best rate of "
        "products of these shapes in the whole run.",
        f"one by one, dense signs: the published way. {len(few)} rows of the sample, evenly spaced by length, each a "
        f"batch of its own with backward into the LoRA matrices and Adam's direction; then {BUFFER} rows times a dense "
        f"matrix of signs, made anew for every {BUFFER} rows in blocks of {BLOCK} columns by torch's generator. Only "
        "some blocks are timed and the time is scaled to all columns: each block is the same work.",
    ]


def same_numbers(work: Workload) -> None:
    """What is timed is right: hooks against one backward pass a row, and the plain loss against ours."""
    keys = list(work.first)[-3:]
    batch = work.fetch(keys)
    work.model.eval()
    fast, slow = (
        batch_rows(work.model, row_losses, batch, work.updates, work.projector, method=method)
        for method in ("hooks", "loop")
    )
    torch.testing.assert_close(fast[1], slow[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-2, atol=1e-6)
    assert torch.cosine_similarity(fast[0], slow[0]).min() > 0.999
    items = [work.rows.item(work.first[key]) for key in keys]
    with torch.no_grad():
        losses, _ = token_losses(work.model, batch)
        theirs = work.model(**padded(items)).loss
    torch.testing.assert_close(theirs, losses.mean(), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- the plain training pass


def padded(items: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    batch = collate(items)
    lengths = torch.tensor([len(ids) for ids, _ in items])
    mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return {**batch, "attention_mask": mask.long()}


def plain(work: Workload, *, in_order: bool) -> int:
    """Forward and backward as a Trainer does them, without its optimizer step; the padded tokens."""
    items = work.items if in_order else sorted(work.items, key=lambda item: len(item[0]))
    work.model.train()
    area = 0
    for start in range(0, len(items), BATCH):
        batch = padded(items[start : start + BATCH])
        work.model(**batch, use_cache=False).loss.backward()
        work.model.zero_grad(set_to_none=True)
        area += batch["input_ids"].numel()
    work.model.eval()
    return area


# ---------------------------------------------------------------- the published way


def spread(work: Workload, count: int) -> list[tuple[list[int], list[int]]]:
    """`count` rows evenly spaced by length: about the sample's tokens a row."""
    rows = [work.first[key] for key in work.first]  # longest first
    step = len(rows) / max(count, 1)
    return [work.rows.item(rows[int((i + 0.5) * step)]) for i in range(max(count, 1))]


def one_by_one(work: Workload, few: list[tuple[list[int], list[int]]], blocks: int) -> dict[str, float]:
    """Seconds of the rows' gradients, of the projection blocks that were run, and what to scale both by."""
    params = {name: p for name, p in work.model.named_parameters() if name in work.updates.params}
    started = perf_counter()
    features = []
    for item in few:
        work.model(**padded([item]), use_cache=False).loss.backward()
        directions = work.updates({name: p.grad for name, p in params.items() if p.grad is not None})
        features.append(torch.cat([d.flatten() for d in directions.values()]))
        work.model.zero_grad(set_to_none=True)
    middle = perf_counter()
    buffer = torch.stack([features[i % len(features)] for i in range(BUFFER)])
    generator = torch.Generator()
    signs = torch.empty(buffer.shape[1], BLOCK)
    out = torch.zeros(BUFFER, DIM)
    measured = min(blocks, DIM // BLOCK)
    for block in range(measured):
        generator.manual_seed(1000 * block)
        signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        out[:, block * BLOCK : (block + 1) * BLOCK] = buffer @ signs
    return {
        "gradients": middle - started,
        "projection": perf_counter() - middle,
        "rows": len(few),
        "columns": measured * BLOCK,
    }


def dense_seconds(parts: dict[str, float]) -> float:
    """Seconds a row of `one_by_one`, all columns counted."""
    return parts["gradients"] / parts["rows"] + parts["projection"] * DIM / parts["columns"] / BUFFER


# ---------------------------------------------------------------- arithmetic


class Bound:
    """Multiply-adds that no method can leave out, and how fast this machine does products of their shapes."""

    def __init__(self, work: Workload) -> None:
        layers, head = [], work.model.get_output_embeddings()
        for name, module in work.model.named_modules():
            inside_adapter = ".lora_" in name
            if isinstance(module, torch.nn.Linear) and module is not head and not inside_adapter:
                layers.append((module.in_features, module.out_features))
        self.tokens, self.answers = work.tokens, work.answer_tokens
        self.head = (head.in_features, head.out_features)
        self.counts = {shape: layers.count(shape) for shape in dict.fromkeys(layers)}
        batches = max(1.0, self.tokens / TOKEN_BUDGET)
        self.rows = min(self.tokens, TOKEN_BUDGET)  # tokens of a full batch
        self.head_rows = max(1, round(self.answers / batches))
        self.best: dict[str, float] = {}
        self.products: dict[str, tuple[Callable[[], Any], float]] = {}
        """Name -> (a product, multiply-adds x 2 of it)."""
        self.work: dict[str, float] = {}
        """Name -> multiply-adds x 2 of the whole pass that are of this shape."""
        generator = torch.Generator().manual_seed(0)
        jobs = [(shape, count * self.tokens, self.rows) for shape, count in self.counts.items()]
        for (inside, outside), times, rows in [*jobs, (self.head, self.answers, self.head_rows)]:
            x = torch.randn(rows, inside, generator=generator)
            g = torch.randn(rows, outside, generator=generator)
            w = torch.randn(outside, inside, generator=generator)
            pair = {"forward": lambda x=x, w=w: x @ w.T, "back": lambda g=g, w=w: g @ w}
            for way, product in pair.items():
                name = f"{way} {inside} -> {outside}"
                self.products[name] = (product, 2.0 * rows * inside * outside)
                self.work[name] = 2.0 * times * inside * outside

    def measure(self) -> dict[str, float]:
        """Operations a second of each product: the best of some tries, in this repetition."""
        best: dict[str, float] = {}
        for _ in range(TRIES):
            for name, (product, operations) in self.products.items():
                started = perf_counter()
                product()
                best[name] = max(best.get(name, 0.0), operations / (perf_counter() - started))
        for name, rate in best.items():
            self.best[name] = max(self.best.get(name, 0.0), rate)
        return best

    def seconds(self, rates: dict[str, float] | None = None) -> float:
        rates = rates or self.best
        return sum(operations / rates[name] for name, operations in self.work.items())

    def described(self) -> dict[str, Any]:
        per_layer = sum(count * inside * outside for (inside, outside), count in self.counts.items())
        total = sum(self.work.values())
        return {
            "weights of the layers": per_layer,
            "weights of the head": self.head[0] * self.head[1],
            "operations of the bound": f"{total:.3g}",
            "tokens of a measured product": self.rows,
        }


def test_stored_features_are_read_back(bench: Settings, tmp_path: Path) -> None:
    """The store that the benchmark writes is a whole one: right rows, unit length."""
    work = prepared(bench, tmp_path, rows=4)
    work.extract(tmp_path / "store")
    rows = torch.cat([block.features for block in GradientFeatures.open(tmp_path / "store").iter_blocks()])
    assert rows.shape == (len(work.first), DIM)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=1e-3, atol=1e-3)
