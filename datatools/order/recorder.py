"""Record a reference run that is trained by another loop: a `Trainer`, or your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files.order_file import Order
from datatools.order.anchors import Anchor, anchor_positions, load_anchor, save_anchor, snapshot
from datatools.order.recipe import Recipe
from datatools.order.reference_run import ReferenceRun
from optim import Optimizer


class Recorder:
    """Records a reference run that another loop trains.

    Call it before each optimizer step, and call `finish` after the last. (`record` trains and records in one call.) A
    batch with the ids of an earlier batch is the same batch: epochs repeat batches. The `Problem` of the run must have
    its batches in the order of `order.batches`.

    Memory: parameters and optimizer states for each anchor.

    Args:
        steps: steps of the whole run.
        anchors: number of anchors, spread over the run including both ends.
        clip: largest norm of the gradient; None does not clip.
        folder: where to store the recording, so that a run that resumes from a checkpoint is recorded further.
        facts: what the run is made with (model, data, code).

    Example:
        >>> import torch
        >>> from optim import AdamW
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer, recorder = AdamW([("weight", weight)], lr=0.1), Recorder(steps=2)
        >>> for step, ids in enumerate((["a", "b"], ["c"]), start=1):
        ...     weight.square().sum().backward()
        ...     recorder(step, ids, optimizer)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> run, order = recorder.finish(optimizer)
        >>> run.sequence, order.batches
        ((0, 1), (('a', 'b'), ('c',)))

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
        """Record the state before a step.

        Args:
            step: number of the step, from 1.
            ids: ids of the rows that the step trains on.
            optimizer: the optimizer, possibly inside accelerate's wrapper.

        Raises:
            UsageError: if the step exceeds `steps`; if rules, weight decay or the ratio of learning rates have changed;
                or if the optimizer is not one of `optim`.
            DataError: if earlier steps were not recorded.

        """
        optimizer, position = _plain(optimizer), step - 1
        if not 0 <= position < self.steps:
            raise UsageError(f"order: step {step} of a run of {self.steps} steps; pass the number of steps as steps=")
        if position > len(self.rates):
            self._restore(step)
        del self.rates[position:], self.batches[position:]  # if the run has returned to its last checkpoint
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
        """Finish the recording after the last step.

        Args:
            optimizer: the optimizer, possibly inside accelerate's wrapper.

        Returns:
            The run, and its batches with their sequence.

        Raises:
            DataError: if steps have not been recorded.

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
                    raise DataError(
                        f"order: step {position + 1} was not recorded, but is an anchor; record a run from its first "
                        "step, or pass folder="
                    )
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
            raise UsageError(
                f"order: {what} changed at step {step}; orders can only be estimated if the recipe stays the same"
            )

    def _restore(self, step: int) -> None:
        """Read what an earlier process recorded of this run, up to `step` - 1."""
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
                "(with Recorder(folder=...), it may be killed and resumed from a checkpoint)"
            )


def _plain(optimizer: Any) -> Optimizer:
    """Return the optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise UsageError(
            f"order: {type(inner).__name__} is not an optimizer of the suite; record a run of optim.AdamW, SGD, "
            "Lion ..., created from model.named_parameters()"
        )
    return inner
