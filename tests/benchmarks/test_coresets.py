"""What choosing rows costs a training step: seconds and peak memory, against training on the kept and on all rows."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from datatools import CoLM, keep_pages
from pipelines.models.lora import add_lora
from pipelines.models.losses import row_losses
from pipelines.settings.parts import LoraConfig
from tests.benchmarks.measure import Report, Settings, interleaved, median, ratio
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.bench

LARGE, KEEP = 32, 16
_PROCESSES = 3  # whose largest peak counts: a kernel that reclaims pages meanwhile makes one smaller
CHOICES: dict[str, dict[str, Any]] = {
    "exact": {},
    "paper_code": {"features": "paper_code", "method": "facility_location"},
    "16 probes": {"features": "probes", "probes": 16},
}


class Work:
    """A decoder of 30 layers with random weights, rows of one length, AdamW; LoRA on all its projections, or whole."""

    def __init__(self, *, tiny: bool, lora: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        hidden, self.length = (64, 32) if tiny else (320, 128)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=hidden,
                intermediate_size=8 * hidden // 3,
                num_hidden_layers=30,
                num_attention_heads=5 if not tiny else 4,
                num_key_value_heads=5 if not tiny else 2,
                max_position_embeddings=self.length,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        self.model: Any = base
        if lora:
            self.model = add_lora(base.requires_grad_(False), LoraConfig(rank=8), seed=0)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(3, 4096, (LARGE, self.length), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : self.length // 2] = -100
        self.batch = {"input_ids": ids, "labels": labels}
        self.sources = [i % 4 for i in range(LARGE)]

    def train(self, rows: int, micro: int) -> None:
        """One optimizer step on the first `rows` rows, `micro` of them a pass."""
        self.model.train()
        for first in range(0, rows, micro):
            part = {key: tensor[first : first + micro] for key, tensor in self.batch.items()}
            (row_losses(self.model, part).sum() / rows).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> None:
        self.model.eval()
        with torch.no_grad():
            for first in range(0, LARGE, KEEP):
                row_losses(self.model, {k: v[first : first + KEEP] for k, v in self.batch.items()})

    def choose(self, settings: dict[str, Any]) -> Callable[[], None]:
        colm = CoLM(self.model, row_losses, keep=KEEP, token_budget=KEEP * self.length, **settings)
        steps = iter(range(10**9))
        return lambda: (colm(self.batch, self.sources, step=next(steps)), None)[1]

    def arms(self) -> dict[str, Callable[[], None]]:
        choices = {f"choosing, {name}": self.choose(settings) for name, settings in CHOICES.items()}
        return choices | {
            "forward pass, large batch": self.forward,
            "training, kept rows": lambda: self.train(KEEP, KEEP),
            "training, large batch in one pass": lambda: self.train(LARGE, LARGE),
            "training, large batch by accumulation": lambda: self.train(LARGE, KEEP),
        }


def peak(arm: str, *, tiny: bool, lora: bool) -> int | None:
    """Bytes that one call of an arm adds to a process of its own, which gives freed pages back, after a first step."""
    code = (
        "import json; from tests.benchmarks.measure import peak_bytes\n"
        "from tests.benchmarks.test_coresets import Work\n"
        f"work = Work(tiny={tiny}, lora={lora}); work.train(1, 1); print(json.dumps(peak_bytes(work.arms()[{arm!r}])))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found: int | None = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_coresets(bench: Settings, tmp_path: Path, lora: bool) -> None:
    tiny = bench.model == "tiny"
    keep_pages()
    work = Work(tiny=tiny, lora=lora)
    arms = work.arms()
    for arm in arms.values():
        arm()  # once before it counts
    samples = interleaved(arms, bench.times(5), bench.seconds)
    kind = "lora" if lora else "full"
    report = Report(f"coresets_{kind}", f"Choosing rows of a large batch, {kind} fine-tuning of 30 layers", bench)
    report.workload = {
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "rows drawn": LARGE, "rows kept": KEEP, "tokens a row": work.length, "supervised": work.length // 2,
    }  # fmt: skip
    for name, found in samples.items():
        report.add(f"{name}: seconds", median(found), "s")
    plain, large = samples["training, kept rows"], samples["training, large batch in one pass"]
    for name in CHOICES:
        found = samples[f"choosing, {name}"]
        report.add(f"choosing, {name}, of a step on the kept rows", ratio(found, plain), "")
        added = sorted(
            (c.seconds - f.seconds) / p.seconds
            for c, f, p in zip(found, samples["forward pass, large batch"], plain, strict=True)
        )
        aim = 0.35 if name == "exact" else None
        report.add(f"beyond the forward pass, {name}, of that step", added[len(added) // 2], "", at_most=aim)
        whole = sorted((c.seconds + t.seconds) / r.seconds for c, t, r in zip(found, plain, large, strict=True))
        aim = 1.0 if name == "exact" else None
        report.add(f"whole step, {name}, of a step on the large batch", whole[len(whole) // 2], "", at_most=aim)
    for name in ("choosing, exact", "training, kept rows", "training, large batch in one pass",
                 "training, large batch by accumulation"):  # fmt: skip
        found_peaks = [peak(name, tiny=tiny, lora=lora) for _ in range(_PROCESSES)]
        grown = None if None in found_peaks else max(p for p in found_peaks if p is not None)
        if grown is not None:
            report.add(f"{name}: peak memory above the model's", grown / 2**20, "MiB")
    report.notes = [
        "choosing reads all rows drawn; a forward pass over twice the kept rows is by arithmetic 2/3 of a full "
        "training step on them, and all of one with LoRA: the aim of 0.35 is for what choosing adds to that pass",
        "memory: the peak resident set of a process of its own above what it held after a step on one row, the largest "
        "of three",
    ]
    report.keep(samples)
    report.write(tmp_path)
