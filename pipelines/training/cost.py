"""The cost of a run before it runs: one pass of its own model over synthetic tokens, multiplied by the work to do.

The same numbers give the answer of a dry run and the remaining time that a run shows. Only synthetic tokens pass
through the model, no optimizer takes a step, and no data is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import nn

from pipelines.models import quantized
from pipelines.models.base import unload
from pipelines.models.lora import add_lora
from pipelines.models.losses import token_losses
from pipelines.runs import current
from pipelines.runs.messages import duration, say, warn
from pipelines.runs.provenance import peak_rss_bytes
from pipelines.settings.parts import LoraConfig, TrainingConfig
from pipelines.texts import NBSP, size
from pipelines.training import fit, optimizers

SMALL, LARGE = 64, 512
"""Synthetic tokens of the two passes, from which the cost per pass and the cost per token follow."""

_ENOUGH = 2.0  # if the small pass takes longer (seconds), the large one is omitted
_STEP, _SAVE, _START = 0.012, 0.15, 0.6
"""Seconds outside the model: a Trainer step, a checkpoint, and the start of a Trainer (2 cores, November 2026)."""

UPDATE = 0.008
"""Seconds of a functional step outside the model (`order`; the same machine)."""

CHECKPOINT_BYTES, ADAPTER_BYTES = 60_000, 18_000
"""Bytes of files other than weights and moments: the Trainer's state, the tokenizer and configurations."""

_WRITTEN, _MOVED = 2e8, 4e9  # bytes per second: to a disk, and through an optimizer's step


@dataclass(frozen=True)
class Probe:
    """The cost of a pass: seconds = `passes` * cost per pass + `tokens` * cost per token, forward or with gradient."""

    forward: tuple[float, float]
    gradient: tuple[float, float]
    saved: float
    """Bytes per token that are kept for a backward pass."""
    trainable: int
    """The number of trained parameters; `width` is the bytes of one in a file."""
    width: int
    length: int
    tokens: int
    on: str
    """Where the passes ran, such as "on cpu in float32"."""

    def seconds(self, tokens: float, passes: float, *, gradient: bool = True) -> float:
        """Return the seconds of a number of tokens and passes.

        Args:
            tokens: The number of tokens.
            passes: The number of passes.
            gradient: Whether the gradient is taken.
        """
        each, rate = self.gradient if gradient else self.forward
        return passes * each + tokens * rate

    def text(self) -> str:
        """Return what the numbers are based on."""
        return f"timed on {self.tokens:,} synthetic tokens in rows of {self.length}, {self.on}"


def probe(module: Any, length: int, *, gradient: bool = True) -> Probe:
    """Time passes of a model over synthetic rows; its parameters and the random generators stay unchanged.

    Args:
        module: The model.
        length: The number of tokens of a row.
        gradient: Whether to take gradients with respect to the parameters that require them.

    Cost:
        Four passes over at most `LARGE` tokens.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    length = max(2, length)
    gradient = gradient and bool(params)
    with torch.random.fork_rng(devices=[]):
        small, large = (made_up(module, length, tokens) for tokens in (SMALL, LARGE))
        passes: list[Callable[[Mapping[str, Any]], Any]] = [lambda batch: _forward(module, batch)]
        if gradient:
            passes.append(lambda batch: _gradient(module, batch, params))
        kept = saved(module, small) / small["input_ids"].numel() if gradient else 0.0
        fits = [_fit(call, small, large) for call in passes]
    width = params[0].element_size() if params else 4
    used = large["input_ids"].numel() if fits[0][1] else small["input_ids"].numel()
    return Probe(fits[0], fits[-1], kept, sum(p.numel() for p in params), width, length, used, place(module))


def place(module: nn.Module) -> str:
    """Return where a model computes: "on cpu in float32".

    Args:
        module: The model.
    """
    first = next(module.parameters())
    return f"on {first.device} in {str(first.dtype).removeprefix('torch.')}"


@contextmanager
def as_trained(model: Any, lora: LoraConfig | None) -> Iterator[Any]:
    """Yield a model with new adapters, or with all weights trainable; restored at the end of the `with` block.

    Args:
        model: The model.
        lora: The adapters; None trains all weights.
    """
    if lora is not None:
        with torch.random.fork_rng(devices=[]):
            module = add_lora(model, lora, seed=0).eval()
        try:
            yield module
        finally:
            unload(module)
        return
    quantized.refuse_training(model)
    before = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    try:
        yield model
    finally:
        for p, needed in zip(model.parameters(), before, strict=True):
            p.requires_grad_(needed)


def made_up(module: Any, length: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return a batch of synthetic rows, drawn at random.

    Args:
        module: The model.
        length: The number of tokens of a row.
        tokens: The approximate number of tokens in total.
    """
    length = max(2, length)
    device = next(module.parameters()).device
    words = int(module.get_input_embeddings().num_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (max(1, tokens // length), length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def _forward(module: Any, batch: Mapping[str, Any]) -> None:
    with torch.inference_mode():
        token_losses(module, batch)


def _gradient(module: Any, batch: Mapping[str, Any], params: Sequence[torch.Tensor]) -> None:
    torch.autograd.grad(token_losses(module, batch)[0].mean(), params, allow_unused=True)


def _fit(
    call: Callable[[Mapping[str, Any]], Any], small: Mapping[str, Any], large: Mapping[str, Any]
) -> tuple[float, float]:
    """Return (seconds per pass, seconds per token)."""
    call(small)  # the first pass allocates
    little, few = _timed(call, small), small["input_ids"].numel()
    many = large["input_ids"].numel()
    if little > _ENOUGH or many <= few:
        return 0.0, little / few
    much = _timed(call, large)
    rate = max(0.0, (much - little) / (many - few))
    return (max(0.0, little - rate * few), rate) if rate else (0.0, much / many)


def _timed(call: Callable[[Mapping[str, Any]], Any], batch: Mapping[str, Any]) -> float:
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        call(batch)
        if batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def saved(module: Any, batch: Mapping[str, Any]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without weights.

    Args:
        module: The model.
        batch: The batch.
    """
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        loss = token_losses(module, batch)[0].mean()
    del loss
    return sum(kept.values())


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Recipe:
    """The cost of a recipe on a model, whatever the rows: seconds of an optimizer step, bytes of its state."""

    step: float
    state: int


def recipe_of(recipe: TrainingConfig, module: nn.Module) -> Recipe:
    """Return the cost of the optimizer of a recipe.

    The optimizer takes no step: for a rule for matrices, one update of a synthetic matrix of each shape is timed; for
    other rules, the time to move their bytes is estimated.

    Args:
        recipe: The recipe.
        module: The model.
    """
    optimizer = optimizers.optimizer_of(recipe, module)
    seconds, state = 0.0, 0
    timed: dict[tuple[str, tuple[int, ...]], float] = {}
    for group in optimizer.param_groups:
        rule = group["rule"] if "rule" in group else getattr(optimizer, "rule", None)
        for p in group["params"]:
            state += 8 * p.numel()  # two float32 moments, as most rules have
            matrix = p.dim() == 2 and rule is not None and not getattr(rule, "elementwise", True)
            if not matrix:
                seconds += 24 * p.numel() / _MOVED
                continue
            key = (type(rule).__name__, tuple(p.shape))
            if key not in timed:
                timed[key] = _update(rule, p)
            seconds += timed[key]
    return Recipe(seconds, state)


def _update(rule: Any, param: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    like = 1e-2 * torch.randn(param.shape, generator=generator).to(param.device)
    with torch.no_grad():
        begin = time.perf_counter()
        rule.update(like, rule.init(like), like)
        return time.perf_counter() - begin


def training(found: Probe, rule: Recipe, recipe: TrainingConfig, lengths: Iterable[float], saves: int = 1) -> float:
    """Return the seconds of a run.

    Args:
        found: The cost of the model.
        rule: The cost of the optimizer.
        recipe: The recipe.
        lengths: The number of tokens of each row.
        saves: The number of checkpoints.
    """
    rows = list(lengths)
    steps = fit.planned_steps(len(rows), recipe)
    share = min(1.0, steps / max(1, recipe.epochs * -(-len(rows) // recipe.batch_size)))
    tokens = sum(rows) * recipe.epochs * share
    passes = steps * max(1.0, -(-tokens / max(1, steps) // recipe.micro_tokens))
    if recipe.gradient == "zo":
        each = 2 * recipe.zo.q
        work = found.seconds(each * tokens, each * passes, gradient=False)
    else:
        work = found.seconds(tokens, passes)
    saved = saves * (_SAVE + (found.trainable * found.width + rule.state) / _WRITTEN)
    return _START + work + steps * (_STEP + rule.step) + saved


def on_gpu() -> bool:
    """Return whether this process computes on a GPU of CUDA, so that its memory is what counts."""
    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0  # 0 as long as nothing is there


def peak() -> int:
    """Return the bytes that this process has used at most: on its GPU, or in main memory if it computes there."""
    return torch.cuda.max_memory_allocated() if on_gpu() else peak_rss_bytes()


def available() -> int:
    """Return the bytes of this process's GPU, or of main memory if it computes there."""
    return int(torch.cuda.mem_get_info()[1] if on_gpu() else psutil.virtual_memory().total)


def memory(found: Probe, state: int, micro_tokens: int) -> int:
    """Return the peak memory in bytes: what is in use now, gradients and moments, and what a backward pass keeps.

    It is that of the GPU if the model computes there, and otherwise main memory.

    Args:
        found: The cost of the model.
        state: The bytes of the optimizer's state.
        micro_tokens: The padded tokens of a micro-batch.
    """
    return int(peak() + 4 * found.trainable + state + found.saved * micro_tokens)


# ------------------------------------------------------------------------------------------------------------ estimate


@dataclass
class Estimate:
    """The expected cost of a run: seconds per part (by its label), tokens, and bytes in memory and on disk."""

    parts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    memory: int = 0
    disk: int = 0
    done: str = ""
    """The finished part, in words."""
    based_on: str = ""

    @property
    def seconds(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts.values())

    def announce(self, what: str = "cost") -> None:
        """Print the estimate as one line.

        Args:
            what: The first word of the line.
        """
        parts = [f"{self.tokens:,} tokens through the model"] if self.tokens else []
        kind = "GPU memory" if on_gpu() else "memory"
        parts += [f"about {duration(self.seconds)}", f"{size(self.memory)} of {kind}", f"{size(self.disk)} on disk"]
        based = f" ({self.based_on})" if self.based_on else ""
        done = f"{self.done}; left: " if self.done else ""
        say(f"{what}: {done}{', '.join(parts)}{based}".replace(NBSP, " "))
        if self.memory > (there := available()):
            advice = "training.micro_tokens, features.token_budget), shorter rows (--max-length), or --dtype bfloat16"
            warn(
                f"{what}: {size(self.memory)} of {kind} are expected, and there are {size(there)}; set smaller batches "
                f"({advice}".replace(NBSP, " ")
            )

    def expect(self) -> None:
        """Let the run's progress count down to the end of all parts."""
        if (run := current.run()) is not None:
            run.expect(self.parts)
