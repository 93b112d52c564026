"""The cost of training runs and measurements on a bench, known before any of them: seconds by label, and tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy

import numpy as np

from pipelines.select.bench import Bench
from pipelines.settings.parts import TrainingConfig
from pipelines.training import cost

_TEST = 0.3  # seconds of the process in which the tests of a row run


class Prices:
    """A sum of runs, each priced by passes of the model over synthetic tokens.

    Attributes:
        each: (seconds, tokens through the model), by the label of the progress bar.
        found: The cost of a pass of the model with adapters.
        rule: The cost of the optimizer.
    """

    def __init__(self, bench: Bench, recipe: TrainingConfig) -> None:
        """Time the model of a bench; nothing is priced yet.

        Args:
            bench: Where runs are trained and measured.
            recipe: Of the training runs.
        """
        self.each = dict[str, tuple[float, int]]()
        self._bench, pool = bench, bench.pool
        with cost.as_trained(bench.loaded.model, bench.lora) as module:
            self.found = cost.probe(module, int(np.median(pool.scan.tokens[pool.usable])))
            self.rule = cost.recipe_of(recipe, module)

    def passes(self, label: str, tokens: float, passes: float, *, gradient: bool = False) -> None:
        """Add passes of the model.

        Args:
            label: Of their progress bar.
            tokens: The tokens that go through it.
            passes: How many passes.
            gradient: Whether gradients are taken.
        """
        self.each[label] = self.found.seconds(tokens, passes, gradient=gradient), int(tokens)

    def measured(self, label: str, bench: Bench | None = None) -> None:
        """Add the measurements of one model.

        Args:
            label: Of its progress bars.
            bench: Where it is measured, if not on the bench that was timed.
        """
        at = bench or self._bench
        tested = at.test.tokens()
        for name, (tokens, passes) in {"losses": (tested, max(1, tested // 2048)), **at.plan.work()}.items():
            self.passes(f"{name}, {label}", tokens, passes)
        if at.plan.tests:
            self.each[f"tests, {label}"] = _TEST * at.plan.tests, 0

    def trained(self, label: str, recipe: TrainingConfig, lengths: Sequence[int]) -> None:
        """Add one training run.

        Args:
            label: Of its progress bar.
            recipe: How the rows are trained on.
            lengths: The tokens of each row.
        """
        self.each[label] = cost.training(self.found, self.rule, recipe, lengths), sum(lengths) * recipe.epochs

    def without(self, labels: Collection[str]) -> Prices:
        """Return the sum without the parts of some runs.

        Args:
            labels: The labels of the runs; the parts of a run are its label, or end with it.
        """
        found = copy(self)
        found.each = {
            name: part for name, part in self.each.items() if not any(name.endswith(label) for label in labels)
        }
        return found

    @property
    def parts(self) -> dict[str, float]:
        """Seconds, by the label of the progress bar."""
        return {label: seconds for label, (seconds, _) in self.each.items()}

    @property
    def tokens(self) -> int:
        """Tokens through the model."""
        return sum(tokens for _, tokens in self.each.values())

    @property
    def adapter(self) -> int:
        """The bytes of one trained adapter on disk."""
        return self.found.trainable * self.found.width + cost.ADAPTER_BYTES

    def memory(self, micro_tokens: int) -> int:
        """Return the peak memory of training in bytes.

        Args:
            micro_tokens: The padded tokens of a micro-batch.
        """
        return cost.memory(self.found, self.rule.state, micro_tokens)
