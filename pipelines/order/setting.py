"""The common setting of the tasks of `datatools order`: batches of rows, the problem as functions, and its start.

Batches and held-out rows are drawn with the seed. The model becomes a loss over named tensors, whose gradients equal
those of `datatools train` to the bit. The reference run starts after a warm-up on other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import optim
from datatools import DataError, Order, UsageError, files, order
from pipelines.colm.sources import clusters_of
from pipelines.models import load as models
from pipelines.models import quantized
from pipelines.models.losses import Batch, row_losses, supervised_tokens, token_losses
from pipelines.order import draw as drawing
from pipelines.order.columns import read_columns
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs.folder import Run
from pipelines.runs.messages import warn
from pipelines.runs.seeds import derive_seed
from pipelines.settings.order import OrderConfig
from pipelines.training import optimizers, order_recipe
from pipelines.training.train import trainable

BLIND = 8
"""The number of the best random orders on the shortlist of a search."""


@dataclass
class Setting:
    """The common setting of all tasks."""

    config: OrderConfig
    run: Run
    plan: Order
    sources: list[str]
    lengths: list[float]
    problem: order.Problem
    recipe: order.Recipe
    facts: dict[str, Any]
    """The facts on which a recorded run depends: digests of the model and of the batches with all tokens."""
    begin: Callable[[int], tuple[order.Params, order.States | None]]
    """Seed number -> parameters and states at position 0, after the warm-up; 0 is that of the reference."""
    parameters: int
    """The number of trained parameters."""
    device: torch.device
    module: Any
    """The model, with trainable parameters."""
    row_losses: Callable[[order.Params, int], list[float]]
    """(parameters, batch) -> the mean loss of each row of the batch, in the order of the plan."""
    columns: dict[str, list[float]] = field(default_factory=dict)
    """The scores that are columns of the rows: name -> one number per batch."""
    start: order.Anchor | None = None
    """The start of every true run, after it was recorded or read."""
    recorded: tuple[tuple[int, int], order.ReferenceRun] | None = None
    """The reference run that was used last, with its number and its number of anchors."""

    def kept(self, folder: str, name: str, *asked: object) -> Path:
        """Return the file of a result, whose name depends on `asked` and on the facts of the run.

        Args:
            folder: The folder inside the run folder.
            name: The beginning of the file name.
            *asked: The values on which the result depends.
        """
        return self.run.path(folder, f"{name}{files.digest(repr((self.facts, asked)).encode())[:16]}.json")

    @cached_property
    def question(self) -> order.Question:
        """The facts from which the estimators derive their costs and refusals."""
        return order.Question(
            steps=len(self.sequence),
            batches=len(self.problem.batches),
            batch_size=self.config.training.batch_size,
            held_out=len(self.problem.validation),
            parameters=self.parameters,
            share=self.problem.share,
            sources=tuple(self.sources),
            recipe=self.recipe,
            settings=self.config,
        )

    @property
    def sequence(self) -> tuple[int, ...]:
        """The first reference order."""
        return self.plan.sequence

    def random_orders(self, purpose: str, count: int) -> list[tuple[int, ...]]:
        """Return seeded permutations of the reference order.

        Args:
            purpose: The purpose, which determines the seed.
            count: The number of permutations.
        """
        found = []
        for number in range(count):
            rng = np.random.default_rng(derive_seed(self.config.seed, "order", purpose, number))
            found.append(tuple(int(b) for b in rng.permutation(self.sequence)))
        return found


def build(config: OrderConfig, current: Run) -> Setting:
    """Read rows, form batches, load the model and prepare its start.

    Args:
        config: The settings.
        current: The run.

    Raises:
        UsageError: Settings do not fit the rows or the model.
        DataError: Rows cannot be used.
        EnvironmentProblem: The model cannot be loaded.
    """
    with current.stage("read"):
        tokenizer = models.load(config.model, tokenizer_only=True)
        if config.model.chat == "auto" and not getattr(tokenizer.tokenizer, "chat_template", None):
            warn("the tokenizer has no chat template; conversations use the template tulu (--chat-template)")
            config = config.model_copy(update={"model": config.model.model_copy(update={"chat": "tulu"})})
        inputs = Inputs(current, config.model, tokenizer)
        rows = inputs.read("data", config.data, bad_rows=True)
        columns = config.validation_columns
        held = inputs.read_like("validation", config.data, config.validation, columns, bad_rows=True)
    facts = inputs.record()
    names: Sequence[str] = rows.pool.sources
    if config.clusters is None:
        batches, held_rows, spare = drawing.draw(config, rows, held, names)
    with current.stage("load model"):
        loaded = models.load(config.model.model_copy(update={"dtype": "float32"}), tokenizer=tokenizer)
        quantized.refuse_rounding(loaded.model)
        module = trainable(loaded.model, config.lora, seed=config.seed).eval()
        _refuse_dropout(module)
    if config.clusters is not None:
        chosen = np.flatnonzero(rows.usable).tolist()
        names = clusters_of(loaded.model, rows, chosen, config.clusters, seed=config.seed)
        batches, held_rows, spare = drawing.draw(config, rows, held, names)
    made = Order(
        tuple(tuple(rows.pool.ids[row] for row in batch) for batch in batches),
        tuple(range(len(batches))) * config.training.epochs,
    )
    device = loaded.model.device
    loss = functional_loss(module)
    held_source = rows if held is None else held
    width = config.training.batch_size
    groups = [held_rows[lo : lo + width] for lo in range(0, len(held_rows), width)]
    budget = config.training.micro_tokens
    validation = [in_parts(held_source, group, budget, device) for group in groups]
    samples, share = None, 1.0
    if config.sample_rows:
        few = [drawing.longest_answers(rows, batch, config.sample_rows) for batch in batches]
        samples = [in_parts(rows, part, budget, device) for part in few]
        share = drawing.tokens(rows, few) / drawing.tokens(rows, batches)
    problem = order.Problem(
        loss,
        [in_parts(rows, batch, budget, device) for batch in batches],
        validation,
        weights=[float(batch[0][0]) for batch in validation],
        samples=samples,
        share=share,
        hvp_method=config.products,
    )
    steps = len(made)
    optimizer = optimizers.optimizer_of(config.training, module)
    recipe = order.Recipe.of(optimizer, _rates(config, optimizer, steps), clip=config.training.gradient_clip)
    base = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    recipe = replace(recipe, rules={name: recipe.rules[name] for name in base})

    warm_rows = drawing.warm_up(config, spare, batches)
    made = replace(
        made, recipe=order_recipe.of(config, rows, batches, warm_rows.tolist(), tokenizer.digests, optimizer)
    )
    made.save(current.path("reference.npz"))

    def begin(number: int) -> tuple[order.Params, order.States | None]:
        params, drawn = base, warm_rows
        if number and config.lora is not None:
            params = _fresh_adapters(module, base, derive_seed(config.seed, "order", "lora", number))
        if not len(drawn):
            return params, None
        if number:  # a seed changes only the order of the same rows
            shuffle = np.random.default_rng(derive_seed(config.seed, "order", "warm-up", number))
            drawn = shuffle.permutation(drawn.ravel()).reshape(drawn.shape)
        warm = order.Problem(loss, [in_parts(rows, batch.tolist(), budget, device) for batch in drawn], validation)
        first = recipe.rates[0]
        flat = replace(recipe, rates=(first,) * len(drawn))
        return order.train(warm, flat, range(len(drawn)), params)

    seen = [rows.keys[row] for batch in [*batches, *warm_rows.tolist()] for row in batch]
    seen += [held_source.keys[row] for group in groups for row in group]
    return Setting(
        config,
        current,
        made,
        [drawing.source_of(names, batch) for batch in batches],
        [float(np.mean([rows.scan.tokens[row] for row in batch])) for batch in batches],
        problem,
        recipe,
        {"model": facts["model"], "batches": files.digest(repr((made, groups, seen)).encode())},
        begin,
        sum(p.numel() for p in base.values()),
        device,
        module,
        _row_losses(module, rows, batches, budget, device),
        read_columns(config.scores if config.task == "curricula" else (), rows, batches),
    )


def _refuse_dropout(module: nn.Module) -> None:
    active = [(name, m.p) for name, m in module.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    config = getattr(module, "config", None)
    attention = float(getattr(config, "attention_dropout", 0) or 0)
    if attention:
        active.append(("attention", attention))
    if active:
        raise UsageError(
            f"the model has dropout {active[0][1]:g} in {active[0][0]}: dropout differs in every run, and no "
            "estimate could separate it from the effect of the order; set it to 0 in the model's config.json"
        )


class _Loss(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: int, batch: Batch) -> Tensor:
        losses, _ = token_losses(self.module, batch)
        return losses.sum() / tokens


def functional_loss(module: nn.Module) -> order.Loss:
    """Return a function (parameters by name, a part of `in_parts`) -> its share of the batch's mean loss.

    Args:
        module: The model.
    """
    whole = _Loss(module)

    def loss(params: order.Params, part: tuple[int, Batch]) -> Tensor:
        named = {f"module.{name}": p for name, p in params.items()}
        value: Tensor = torch.func.functional_call(whole, named, part)
        return value

    return loss


class _RowLosses(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        return row_losses(self.module, batch)


def _row_losses(
    module: nn.Module, rows: Rows, batches: Sequence[Sequence[int]], micro_tokens: int, device: torch.device | str
) -> Callable[[order.Params, int], list[float]]:
    whole = _RowLosses(module)

    def losses(params: order.Params, batch: int) -> list[float]:
        named = {f"module.{name}": p for name, p in params.items()}
        found = [0.0] * len(batches[batch])
        with torch.no_grad():
            for places, part in rows.micro_batches(batches[batch], micro_tokens, device):
                values = torch.func.functional_call(whole, named, part).tolist()
                for place, value in zip(places, values, strict=True):
                    found[place] = value
        return found

    return losses


def in_parts(rows: Rows, batch: Sequence[int], micro_tokens: int, device: torch.device | str = "cpu") -> order.Parts:
    """Return a batch as micro-batches of `DataTrainer.training_step`: (supervised tokens of the batch, padded rows).

    `datatools train` then has the same gradients to the bit, and differs only in the last bit of its fused steps.

    Args:
        rows: The rows.
        batch: The numbers of the rows.
        micro_tokens: The padded tokens of a micro-batch.
        device: The device of the tensors.

    Raises:
        DataError: The batch has no supervised token.
    """
    items = [rows.item(row) for row in batch]
    tokens = supervised_tokens(items)
    if not tokens:
        raise DataError(f"order: none of the rows {list(batch)[:5]} of a batch has a supervised token")
    return order.Parts((tokens, part) for _, part in rows.micro_batches(batch, micro_tokens, device))


def _rates(config: OrderConfig, optimizer: optim.Optimizer, steps: int) -> list[float]:
    factors = optimizers.factors(config.training, steps, optimizer)
    rates = [[factor(t) for factor in factors] for t in range(steps)]
    if any(max(row) - min(row) > 1e-12 for row in rates):
        raise UsageError(
            f"training.schedule {config.training.schedule} differs between groups of parameters; an order is estimated "
            "with one schedule for all"
        )
    return [float(optimizer.param_groups[0]["lr"]) * row[0] for row in rates]


def _fresh_adapters(module: nn.Module, base: order.Params, seed: int) -> order.Params:
    """Return `base` with new lora_A matrices."""
    params = dict(base)
    for number, (name, p) in enumerate(base.items()):
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(derive_seed(seed, number))
            bound = p.shape[1] ** -0.5
            params[name] = torch.empty(p.shape).uniform_(-bound, bound, generator=generator).to(p)
    return params
