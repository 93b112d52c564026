"""Recording a reference run that another loop trains: a `Trainer`, or your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files.order_file import Order
from datatools.order.recipe import Recipe
from datatools.order.reference_run import Anchor, ReferenceRun, anchor_positions, load_anchor, save_anchor, snapshot
from optim import Optimizer


class Recorder:
    """Call it before each optimizer step, and `finish` after the last; `reference.record` is the same with a loop.

        recorder = Recorder(steps=T)
        for step, (ids, batch) in enumerate(batches, start=1):
            loss(batch).backward()
            recorder(step, ids, optimizer)
            optimizer.step()
        run, order = recorder.finish(optimizer)

    A batch with the ids of an earlier one is that batch again: epochs in the same batches repeat them. A `Problem` for
    the run holds the batches in the order of `order.batches`. Memory: parameters and optimizer states per anchor.

    Args:
        steps: of the whole run.
        anchors: how many are kept, spread over the run with both ends among them.
        clip: the largest norm of the gradient.
        folder: keeps what was seen, so that a run which continues from a checkpoint continues to be recorded.
        facts: what the run is made with.
    """

    def __init__(
        self,
        *,
        steps: int,
        anchors: int = 3,
        clip: float | None = None,
        folder: files.PathLike | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.steps, self.clip, self.facts = steps, clip, dict(facts or {})
        self.folder = None if folder is None else Path(folder)
        self.positions = anchor_positions(steps, anchors)
        self.rates: list[float] = []
        self.batches: list[tuple[str, ...]] = []
        """The ids of each step."""
        self._anchors: dict[int, Anchor] = {}
        self._recipe: Recipe | None = None

    def __call__(self, step: int, ids: Sequence[object], optimizer: Any) -> None:
        """Record what is there before step `step` = 1, 2, ... on the examples `ids`.

        Raises:
            UsageError: for a step too many; when rules, decay or the ratio of learning rates change on the way; or for
                an optimizer that is not the suite's.
            DataError: when earlier steps were not recorded.
        """
        optimizer, position = _plain(optimizer), step - 1
        if not 0 <= position < self.steps:
            raise UsageError(f"order: step {step} of a run of {self.steps} steps; say steps= as many as it takes")
        if position > len(self.rates):
            self._restore(step)
        del self.rates[position:], self.batches[position:]  # a run that went back to its last checkpoint
        rate = float(optimizer.param_groups[0]["lr"])
        if rate > 0:
            self._same(Recipe.of(optimizer, [rate], clip=self.clip), step)
        self.rates.append(rate)
        self.batches.append(tuple(str(i) for i in ids))
        if self.folder is not None:
            files.make_folder(self.folder)
            seen = {"rates": self.rates, "batches": self.batches, "recipe": self._recipe and self._recipe.describe()}
            files.write_json(self.folder / "steps.json", seen)
        self._keep(position, optimizer)

    def finish(self, optimizer: Any) -> tuple[ReferenceRun, Order]:
        """After the last step: the run, and its batches with their sequence.

        Raises:
            DataError: before the last step.
        """
        if len(self.rates) < self.steps:
            self._restore(self.steps + 1)
        optimizer = _plain(optimizer)
        recipe = self._recipe or Recipe.of(optimizer, [0.0], clip=self.clip)
        recipe = Recipe(recipe.rules, tuple(self.rates), recipe.factors, recipe.weight_decay, recipe.clip)
        self._keep(self.steps, optimizer)
        number: dict[tuple[str, ...], int] = {}
        sequence = tuple(number.setdefault(batch, len(number)) for batch in self.batches)
        for position in self.positions:
            if position not in self._anchors:
                if self.folder is None:
                    raise DataError(f"order: step {position + 1} was not recorded, and is an anchor")
                self._anchors[position] = load_anchor(self.folder, position, recipe)
        run = ReferenceRun(sequence, recipe, tuple(self._anchors[p] for p in self.positions), self.facts)
        if self.folder is not None:
            run.save(self.folder)
        return run, Order(tuple(number), sequence)

    def _keep(self, position: int, optimizer: Optimizer) -> None:
        if position in self.positions:
            self._anchors[position] = snapshot(optimizer, position)
            if self.folder is not None:
                save_anchor(self.folder, self._anchors[position])

    def _same(self, now: Recipe, step: int) -> None:
        if self._recipe is None:
            self._recipe = now
        before = self._recipe
        moved = [n for n, f in now.factors.items() if abs(f - before.factors.get(n, f)) > 1e-6 * abs(f)]
        if moved or now.rules != before.rules or now.weight_decay != before.weight_decay:
            what = f"the learning rate of {moved[0]!r} against the first group's" if moved else "a rule or weight decay"
            raise UsageError(f"order: {what} changed at step {step}; an order is estimated with one recipe for all")

    def _restore(self, step: int) -> None:
        """What an earlier process recorded of this run, up to `step` - 1."""
        path = None if self.folder is None else self.folder / "steps.json"
        if path is not None and path.is_file():
            found = files.read_json(path)
            self.rates = [float(rate) for rate in found["rates"]]
            self.batches = [tuple(batch) for batch in found["batches"]]
            self._recipe = found["recipe"] and Recipe.from_description(found["recipe"])
        if len(self.rates) < step - 1:
            where = "" if path is None else f" in {path}"
            raise DataError(
                f"order: {len(self.rates)} of {step - 1} steps were recorded{where}; record a run from its first step "
                "(with Recorder(folder=...) it may be killed, and go on from a checkpoint)"
            )


def _plain(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise UsageError(
            f"order: {type(inner).__name__} is no optimizer of the suite; record a run of optim.AdamW, SGD, Lion ..., "
            "built from model.named_parameters()"
        )
    return inner
