"""Which cheaper features still say what training does? Agreement with exact influence and with true retraining.

    python -m tests.benchmarks.fidelity --model ../shared/data/models/stories260k --chat tulu --out runs/fidelity

A small model is trained, all weights, on random halves of a pool. For each target row, the loss after training on a
half is compared with the sum of the influences of its rows: the rank correlation over halves, averaged over target
rows, is the linear datamodelling score (Park et al. 2023, arXiv 2303.14186). Agreement is the rank correlation of the
influences with those of exact features (every parameter, no projection, 32 bits, all checkpoints) of the same update.
Cost is the processor time of features per row in forward passes of the same rows, over all checkpoints, and the bytes
that a store keeps per row. Retrainings are kept in `--out`, so that an interrupted benchmark goes on.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import optim
from datatools import ENCODINGS, PROJECTORS, batch_rows, files
from datatools.features.encodings import decode, encode, normalize
from optim import AdamWRule, SGDRule, UpdateMap, UpdateRule
from pipelines.models import load as models
from pipelines.models.lora import add_lora
from pipelines.models.losses import last_states, row_losses, seen_parameters
from pipelines.rows.prepare import prepare
from pipelines.rows.rows import Rows
from pipelines.select.parameters import chosen
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig
from pipelines.settings.select import FeaturesConfig
from tests.benchmarks import fidelity_page
from tests.benchmarks.fidelity_scores import correlations, datamodelling, front, interval

SHARED = Path(os.environ.get("DATATOOLS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
RULES: dict[str, UpdateRule | None] = {"paper": None, "precond_only": AdamWRule(betas=(0.0, 0.999)), "plain": SGDRule()}
"""How a gradient of a pool row becomes an update: `features.adam_mode`, or not at all."""


@dataclass(frozen=True)
class Arm:
    """Settings of features.

    Attributes:
        name: What the table calls it.
        layers: `features.layers`.
        modules: `features.modules`.
        dim: `projector.dim`; 0 is no projection.
        projector: `projector.name`.
        dtype: `features.dtype`.
        last: Whether only the last checkpoint counts.
        rule: A key of `RULES`.
        whole: Whether every parameter counts, instead of the linear layers.
        lora: Whether the parameters are those of adapters, trained on the same rows.
        states: Whether features are the hidden states of the last layer instead of gradients.
        product: Whether influence is the inner product instead of the cosine.
    """

    name: str
    layers: str | None = None
    modules: tuple[str, ...] | None = None
    dim: int = 8192
    projector: str = "sjlt"
    dtype: str = "float16"
    last: bool = False
    rule: str = "paper"
    whole: bool = False
    lora: bool = False
    states: bool = False
    product: bool = False


EXACT = Arm("exact", dim=0, projector="identity", dtype="float32", whole=True)
FULL = Arm("linear layers, sjlt 8192, 16 bits")
V_AND_O = ("v_proj", "o_proj")
ARMS: tuple[Arm, ...] = (
    EXACT,
    replace(EXACT, name="exact, inner products", product=True),
    replace(EXACT, name="exact, last checkpoint", last=True),
    replace(EXACT, name="exact, precond_only", rule="precond_only"),
    replace(EXACT, name="exact, plain gradients", rule="plain"),
    replace(EXACT, name="linear layers, no projection", whole=False),
    FULL,
    *(replace(FULL, name=f"dim {dim}", dim=dim) for dim in (2048, 512, 128, 32)),
    *(replace(FULL, name=f"dim 8192, {dtype}", dtype=dtype) for dtype in ("float32", "int8", "int4", "int1")),
    replace(FULL, name="last checkpoint", last=True),
    replace(FULL, name="plain gradients", rule="plain"),
    replace(FULL, name="plain gradients, factored", rule="plain", projector="factored"),
    replace(FULL, name="precond_only", rule="precond_only"),
    *(replace(FULL, name=layers, layers=layers) for layers in ("last-1", "last-2", "middle-1", "middle-2", "first-2")),
    replace(FULL, name="v and o", modules=V_AND_O),
    replace(FULL, name="q and k", modules=("q_proj", "k_proj")),
    replace(FULL, name="mlp", modules=("mlp",)),
    replace(FULL, name="last-2, v and o", layers="last-2", modules=V_AND_O),
    replace(FULL, name="v and o, dim 2048, int4", modules=V_AND_O, dim=2048, dtype="int4"),
    replace(FULL, name="v and o, dim 2048, int4, last checkpoint", modules=V_AND_O, dim=2048, dtype="int4", last=True),
    replace(FULL, name="precond_only, int1", rule="precond_only", dtype="int1"),
    replace(FULL, name="precond_only, int1, last checkpoint", rule="precond_only", dtype="int1", last=True),
    replace(FULL, name="plain gradients, int1", rule="plain", dtype="int1"),
    replace(FULL, name="LoRA rank 8", lora=True),
    Arm("hidden states, last checkpoint", dim=0, states=True, last=True),
)


@dataclass
class Checkpoint:
    """A model during the reference run, and its optimizer."""

    weights: dict[str, Tensor]
    updates: UpdateMap


class Problem:
    """Rows, a model and a recipe of training."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        self.config = ModelConfig(name=str(o.model), chat=o.chat, max_length=o.max_length)
        loaded = models.load(self.config)
        self.model, self.rows = loaded.model.eval().requires_grad_(True), self._rows(loaded.tokenizer)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        usable = [int(i) for i in np.flatnonzero(self.rows.usable)]
        by_source: dict[str, list[int]] = {}
        for i in usable:
            by_source.setdefault(self.sources[i], []).append(i)
        sources = [some for some in by_source.values() if len(some) >= o.pool + o.targets]
        if not sources:
            raise SystemExit(f"no source has {o.pool + o.targets} rows of at most {o.max_length} tokens")
        self.pool = [i for some in sources for i in some[: o.pool]]
        self.target = [i for some in sources for i in some[o.pool : o.pool + o.targets]]

    def _rows(self, tokenizer: Any) -> Rows:
        short = self.o.out / "rows.jsonl"
        lines = [json.loads(line) for line in Path(self.o.rows).read_text(encoding="utf-8").splitlines()]
        kept = [one for one in lines if sum(len(m["content"]) for m in one["messages"]) <= self.o.characters]
        files.write_text(short, "".join(json.dumps(one) + "\n" for one in kept))
        self.sources = [one["dataset"] for one in kept]
        data = DataConfig(paths=[str(short)])
        return prepare(data, self.config, tokenizer, cache=self.o.out / "cache", label="rows")

    def train(self, model: Any, rows: Sequence[int], lr: float, stops: int = 0) -> list[Checkpoint]:
        """Train the model in place, and return `stops` checkpoints at equal distances."""
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = optim.create("adamw", params, lr=lr, weight_decay=0.0)
        draw = np.random.default_rng(self.o.seed)
        orders = [draw.permutation(len(self.pool)) for _ in range(self.o.epochs)]  # of the pool: the same for all
        inside = set(rows)
        steps = [
            some[i : i + 8]
            for order in orders
            for some in [[self.pool[k] for k in order if self.pool[k] in inside]]
            for i in range(0, len(some), 8)
        ]
        found = []
        for step, batch in enumerate(steps, 1):
            row_losses(model, self.rows.batch(batch)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if stops and step * stops // len(steps) > (step - 1) * stops // len(steps):
                weights = {name: p.detach().clone() for name, p in params}
                found.append(Checkpoint(weights, UpdateMap.of(optimizer)))
        return found

    def retrained(self, rows: Sequence[int]) -> list[float]:
        """The loss of each target row after training on some rows of the pool."""
        self.load(self.start)
        self.train(self.model, rows, self.o.lr)
        with torch.no_grad():
            return [float(x) for part in self.parts(self.target) for x in row_losses(self.model, part)]

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the model."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])

    def parts(self, rows: Sequence[int]) -> list[Mapping[str, Tensor]]:
        """Batches of eight rows, in order."""
        return [self.rows.batch(list(rows[i : i + 8])) for i in range(0, len(rows), 8)]


class Extraction:
    """Features of the pool and the target at the checkpoints; each kind is computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        o = problem.o
        problem.load(problem.start)
        self.checkpoints = problem.train(problem.model, problem.pool, o.lr, o.checkpoints)
        base = models.load(problem.config).model
        self.adapted = add_lora(base, LoraConfig(rank=8), seed=o.seed).eval()
        self.adapters = problem.train(self.adapted, problem.pool, o.lora_lr, o.checkpoints)
        self.of = cache(self._of)
        self.forward: dict[bool, float] = {}

    def influence(self, arm: Arm) -> tuple[NDArray[np.float64], float]:
        """Influences [pool, target], the mean over checkpoints, and the forward passes that they cost per pool row."""
        stops = range(self.problem.o.checkpoints)[-1 if arm.last else 0 :]
        total = np.zeros((len(self.problem.pool), len(self.problem.target)))
        passes = 0.0
        extracted = replace(arm, name="", dtype="", last=False, product=False)
        for stop in stops:
            pool, target, cost = self.of(extracted, stop)
            if arm.product:
                total += pool.double().numpy() @ target.double().numpy().T
            else:
                ours, theirs = (rounded(some, arm.dtype).double().numpy() for some in (pool, target))
                total += ours @ theirs.T
            passes += cost
        return total / len(stops), passes

    def _of(self, arm: Arm, stop: int) -> tuple[Tensor, Tensor, float]:
        problem = self.problem
        model, found = (self.adapted, self.adapters) if arm.lora else (problem.model, self.checkpoints)
        with torch.no_grad():
            params = dict(model.named_parameters())
            for name, value in found[stop].weights.items():
                params[name].copy_(value)
        pool, target = problem.parts(problem.pool), problem.parts(problem.target)
        if arm.lora not in self.forward:
            self.forward[arm.lora] = min(self._timed(lambda: self._forward(model, pool))[1] for _ in range(3))
        forward = self.forward[arm.lora]
        if arm.states:
            (ours, spent), (theirs, _) = (self._timed(lambda p=p: states(model, p)) for p in (pool, target))
            return ours, theirs, spent / forward
        names = list(found[stop].weights)
        if not arm.whole:
            seen = seen_parameters(model, {name: params[name] for name in names}, "hooks")
            asked = FeaturesConfig(layers=arm.layers, modules=list(arm.modules) if arm.modules else None)
            names = chosen(seen, asked)
        shapes = {name: params[name].shape for name in names}
        projector = PROJECTORS[arm.projector].of(shapes, arm.dim, self.problem.o.seed)
        plain, updates = (restricted(found[stop].updates, names, rule) for rule in (SGDRule(), RULES[arm.rule]))

        def features(parts: Sequence[Mapping[str, Tensor]], of: UpdateMap) -> Tensor:
            return torch.cat([batch_rows(model, row_losses, part, of, projector)[0] for part in parts])

        features(pool[:1], updates)  # the first call verifies the fast path
        ours, spent = self._timed(lambda: features(pool, updates))
        return ours, features(target, plain), spent / forward

    @staticmethod
    def _forward(model: Any, parts: Sequence[Mapping[str, Tensor]]) -> None:
        with torch.inference_mode():
            for part in parts:
                row_losses(model, part)

    @staticmethod
    def _timed(work: Any) -> tuple[Any, float]:
        began = time.process_time()
        result = work()
        return result, time.process_time() - began


def restricted(found: UpdateMap, names: Sequence[str], rule: UpdateRule | None) -> UpdateMap:
    """The updates of some parameters, by another rule if one is given; Adam's rules keep the state."""
    params = {name: found.params[name] for name in names}
    if rule is None or isinstance(rule, AdamWRule):
        rules = {name: rule or found.rules[name] for name in names}
        return UpdateMap(rules, {name: found.states[name] for name in names}, params)
    return UpdateMap(dict.fromkeys(names, rule), {name: rule.init(p) for name, p in params.items()}, params)


@torch.inference_mode()
def states(model: Any, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Hidden states of the last layer, averaged over the tokens of a row with weights 1, 2, ..."""
    found = []
    for part in parts:
        hidden, ids = last_states(model, part["input_ids"]), part["input_ids"]
        last = (part["labels"] != -100).long() * torch.arange(ids.shape[1])
        weights = torch.arange(1.0, ids.shape[1] + 1) * (torch.arange(ids.shape[1]) <= last.amax(1, keepdim=True))
        found.append((hidden.float() * weights[..., None]).sum(1))
    return torch.cat(found)


def rounded(features: Tensor, dtype: str) -> Tensor:
    """Features of unit length, as a store gives them back."""
    stored, scale = encode(normalize(features.numpy())[0], dtype)
    return decode(stored, scale, dtype, features.shape[1])


def subsets(o: argparse.Namespace, size: int) -> NDArray[np.bool_]:
    """Random halves of a pool [subsets, size]."""
    draw = np.random.default_rng(o.seed + 1)
    inside = np.zeros((o.subsets, size), dtype=bool)
    for one in inside:
        one[draw.permutation(size)[: size // 2]] = True
    return inside


def retrain(problem: Problem, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The losses of the target rows after training on each subset; those in `--out` are kept."""
    o, file = problem.o, problem.o.out / "retrained.json"
    settings = {name: str(getattr(o, name)) for name in ("model", "rows", "pool", "targets", "epochs", "lr", "seed")}
    kept = json.loads(file.read_text()) if file.is_file() else {"settings": settings, "losses": []}
    if kept["settings"] != settings:
        raise SystemExit(f"{file} has retrainings with {kept['settings']}; choose another --out")
    for n, one in enumerate(inside[len(kept["losses"]) :], len(kept["losses"]) + 1):
        kept["losses"].append(problem.retrained([row for row, there in zip(problem.pool, one, strict=True) if there]))
        if n % 10 == 0 or n == len(inside):
            files.write_json(file, kept)
            print(f"{n} of {len(inside)} retrainings", flush=True)
    return np.array(kept["losses"][: len(inside)])


def measure(problem: Problem, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One row of the table for each arm."""
    inside = subsets(problem.o, len(problem.pool))
    losses = retrain(problem, inside)
    extraction = Extraction(problem)
    exact = {rule: extraction.influence(replace(EXACT, rule=rule))[0] for rule in RULES}
    count = max(1, len(problem.pool) // 10)
    found = []
    for arm in arms:
        influences, passes = extraction.influence(arm)
        truth = exact[arm.rule]
        stops = 1 if arm.last else problem.o.checkpoints
        size = extraction.of(replace(arm, name="", dtype="", last=False, product=False), problem.o.checkpoints - 1)[0]
        top = [set(some.mean(1).argsort()[-count:].tolist()) for some in (influences, truth)]
        row = {
            **asdict(arm),
            "score": float(datamodelling(influences, inside, losses).mean()),
            "interval": interval(influences, inside, losses),
            "agreement": float(correlations(influences, truth).mean()),
            "top": len(top[0] & top[1]) / count,
            "passes": passes,
            "bytes": stops * (size.shape[1] * ENCODINGS[arm.dtype].bits // 8 + 8),
        }
        found.append(row)
        print(
            f"{arm.name}: score {row['score']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f}), agreement "
            f"{row['agreement']:.3f}, top {row['top']:.2f}, {passes:.2f} passes, {row['bytes']:,} bytes", flush=True,
        )  # fmt: skip
    for axis in ("passes", "bytes"):
        best = front([(row[axis], row["score"]) for row in found])
        for i, row in enumerate(found):
            row[f"best_by_{axis}"] = i in best
    return found


def main() -> None:
    """Retrain, extract, and write results.json, report.html and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a hub name or a .gguf file")
    parser.add_argument("--chat", default="auto", help="auto, or tulu for a tokenizer without a template (stories260k)")
    parser.add_argument("--rows", type=Path, default=SHARED / "data/train/mix-1k.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=12, help="rows of the pool from each source")
    parser.add_argument("--targets", type=int, default=3, help="target rows from each source")
    parser.add_argument("--characters", type=int, default=160, help="the longest rows that are used")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--lora-lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    problem = Problem(o)
    print(f"{len(problem.pool)} rows of the pool, {len(problem.target)} target rows", flush=True)
    rows = measure(problem, ARMS)
    facts = {"pool": len(problem.pool), "targets": len(problem.target), "subsets": o.subsets, "epochs": o.epochs,
             "lr": o.lr, "checkpoints": o.checkpoints, "model": Path(o.model).name, "seed": o.seed,
             "parameters": sum(p.numel() for p in problem.start.values())}  # fmt: skip
    files.write_json(o.out / "results.json", {"facts": facts, "arms": rows})
    fidelity_page.write(o.out, facts, rows)


if __name__ == "__main__":
    main()
