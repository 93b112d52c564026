"""The same rows through other libraries' extraction, where they are installed (they are no dependency of ours).

bergson 2.5.1 and dattri-llm 0.1.0 live in an environment of their own that sees this one; see README.md.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from datatools import GradientFeatures
from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio
from tests.benchmarks.test_extraction import BATCH, padded
from tests.benchmarks.workload import TOKEN_BUDGET, Workload, folder_bytes, pool_name, prepared

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]  # theirs warn about many things

SIDE, EACH, GLOBAL = 6, 34, 512
"""Projected sizes of the others. SmolLM2 has 240 matrices: 240 x 6 x 6 and 240 x 34 numbers a row, about our 8192."""

Arm = Callable[[Path], int]
"""Extracts all rows into a new folder; rows it stored."""


def test_peers(bench: Settings, tmp_path: Path) -> None:
    if not (installed("bergson") or installed("dattri_llm")):
        pytest.skip("neither bergson nor dattri-llm is installed; tests/benchmarks/README.md says how")
    work = prepared(bench, tmp_path, rows=bench.size(16, 16))
    arms: dict[str, Arm] = {"datatools, SJLT 8192": lambda folder: ours(work, folder)}
    if installed("bergson"):
        arms |= bergson_arms(work, tmp_path)
    if installed("dattri_llm"):
        arms |= dattri_arms(work)
    count = iter(range(10**6))
    used: dict[str, Path] = {}

    def run(name: str) -> int:
        used[name] = tmp_path / "features" / str(next(count))
        used[name].mkdir(parents=True)
        return arms[name](used[name])

    samples = interleaved({name: lambda n=name: run(n) for name in arms}, bench.times(3), bench.seconds)
    report = Report("peers", "Extraction beside bergson and dattri-llm: same model, rows, optimizer state", bench)
    report.workload = {"rows from": pool_name(bench), **work.described()}
    first, *others = arms
    for name in arms:
        stored = {sample.value for sample in samples[name]}
        assert stored == {len(work.first)}, f"{name} stored {stored} rows of {len(work.first)}"
        report.add(f"{name}: seconds a row", median(samples[name]) / len(work.first), "s")
        report.add(f"{name}: bytes a row, everything included", folder_bytes(used[name]) / len(work.first), "bytes")
    for name in others:
        report.add(f"time of {name} / {first}", ratio(samples[name], samples[first]), "x")
    report.notes += [
        "All in one process with the model loaded: no library pays for starting up. All write to disk, and all see the "
        "second moments of the same AdamW state.",
        f"bergson: its collector and its builder, {TOKEN_BUDGET} tokens a batch, mean loss of a row, gradients divided "
        "by the root of Adam's second moment (it leaves the first one out); `per module` projects each LoRA matrix "
        f"from both sides to {SIDE} x {SIDE}, `global` all of them to one vector of {GLOBAL}, smaller than ours "
        "because its signs are made again for every batch.",
        f"dattri-llm: hooks during plain batches of {BATCH} rows in file order, Adam's direction of each row, {EACH} "
        "coordinates of each LoRA matrix kept (`mask`, its cheapest projection) or projected to (`dense`, Rademacher), "
        "its own writer.",
        "Bytes: what a row takes on disk with all files; the libraries store different numbers of values.",
    ]
    report.keep(samples)
    report.write(tmp_path)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def ours(work: Workload, folder: Path) -> int:
    work.extract(folder / "store")
    return len(GradientFeatures.open(folder / "store"))


@contextmanager
def trainable(model: Any, wanted: Callable[[str], bool]) -> Iterator[None]:
    """Only parameters whose names are `wanted` ask for gradients."""
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(wanted(name))
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(asked[name])
        model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- bergson


def bergson_arms(work: Workload, folder: Path) -> dict[str, Arm]:
    from datasets import Dataset
    from peft import get_peft_model_state_dict

    items = work.items
    rows = Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in items],
            "labels": [labels for _, labels in items],
            "length": [len(ids) for ids, _ in items],
        }
    )
    moments = {name.replace(".default.", "."): state["exp_avg_sq"] for name, state in work.updates.states.items()}
    order = list(get_peft_model_state_dict(work.model))  # what its reader takes integers to mean
    state = {i: {"exp_avg_sq": moments[name]} for i, name in enumerate(order)}
    saved = folder / "optimizer.pt"
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, saved)
    return {
        f"bergson, per module {SIDE} x {SIDE}": lambda out: bergson(work, rows, saved, out, SIDE, "per_module"),
        f"bergson, global {GLOBAL}": lambda out: bergson(work, rows, saved, out, GLOBAL, "global"),
    }


def bergson(work: Workload, rows: Any, saved: Path, folder: Path, dim: int, target: str) -> int:
    from bergson import IndexConfig, collect_gradients, load_gradients
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import create_processor, extract_peft_target_modules

    config = IndexConfig(
        run_path=str(folder / "index"),
        projection_dim=dim,
        projection_target=target,
        token_batch_size=TOKEN_BUDGET,
        loss_reduction="mean",
        optimizer_state=str(saved),
        projection_seed=0,
    )
    config.partial_run_path.mkdir(parents=True)
    modules = extract_peft_target_modules(work.model)
    with trainable(work.model, lambda name: "embed_tokens" in name):
        processor = create_processor(work.model, config, modules)
        assert len(processor.normalizers) == len(work.names)
        batches = allocate_batches(rows["length"][:], config.token_batch_size)
        collect_gradients(work.model, rows, processor, config, batches=batches, target_modules=modules)
    features = load_gradients(str(config.partial_run_path))
    return int((features != 0).any(1).sum())


# ---------------------------------------------------------------- dattri-llm


def dattri_arms(work: Workload) -> dict[str, Arm]:
    mask = {"style": "mask", "proj_dim": EACH}
    dense = {"style": "dense", "proj_dim": EACH, "proj_type": "rademacher", "proj_max_batch_size": BATCH}
    arms: dict[str, Arm] = {"dattri-llm, mask": lambda folder: dattri(work, folder, mask)}
    if installed("dattri"):  # its projections
        arms["dattri-llm, dense"] = lambda folder: dattri(work, folder, dense)
    return arms


def dattri(work: Workload, folder: Path, projection: dict[str, Any]) -> int:
    from dattri_llm import GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback

    params = dict(work.model.named_parameters())
    optimizer = torch.optim.AdamW([params[name] for name in work.names], lr=1e-3)
    for name, state in work.updates.states.items():
        optimizer.state[params[name]] = {key: value.clone() for key, value in state.items()}
    manager = GradientStorageManager(str(folder))
    hooks = HookManager(
        work.model,
        config=HookManagerConfig(linear_io=[r"lora_[AB]\."], projection_kwargs={"__default__": projection}),
        callbacks=[OffloadCallback(offload_interval=1, file_manager=manager, recording_type="per_sample")],
        optimizer=optimizer,
    )
    items = work.items
    with trainable(work.model, lambda name: name in work.updates.params), hooks.collect(deregister_on_exit=True):
        for start in range(0, len(items), BATCH):
            work.model(**padded(items[start : start + BATCH]), use_cache=False).loss.backward()
            work.model.zero_grad(set_to_none=True)
    return sum(len(places) for places in GradientStorageManager(str(folder)).index.values())  # by content
