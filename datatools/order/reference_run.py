"""A recorded run with its anchors: parameters and optimizer states at some of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files import sealed
from datatools.files.order_file import check_permutation
from datatools.order.anchors import Anchor, anchor_path, anchor_positions, load_anchor, save_anchor
from datatools.order.problem import Params, Problem, check_repeatable
from datatools.order.recipe import Recipe, States, train

_FORMAT = 2  # 1 had no seals


@dataclass(frozen=True)
class ReferenceRun:
    """One recorded run: its sequence of batches, its recipe, and its anchors.

    Attributes:
        sequence: T batch numbers.
        recipe: how parameters are updated.
        anchors: anchors by position; the first and the last are the ends of the run.
        facts: what the run was made with (model, data, code); `check_same` refuses others.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> reference.start.position, reference.end.position
        (0, 4)

    """

    sequence: tuple[int, ...]
    recipe: Recipe
    anchors: tuple[Anchor, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Anchor:
        """The anchor before the first step."""
        return self.anchors[0]

    @property
    def end(self) -> Anchor:
        """The anchor after the last step."""
        return self.anchors[-1]

    def nearest(self, position: float) -> Anchor:
        """Find the anchor closest to a position.

        Args:
            position: between 0 and T.

        Returns:
            The anchor; the earlier one in a tie.

        """
        return min(self.anchors, key=lambda anchor: (abs(anchor.position - position), anchor.position))

    def check(self, sequence: Sequence[int]) -> None:
        """Check that `sequence` is a permutation of the reference's.

        Args:
            sequence: batch numbers.

        Raises:
            UsageError: if it is not.

        """
        check_permutation(sequence, self.sequence)

    def check_same(self, facts: Mapping[str, Any], what: str = "this run") -> None:
        """Check that the run was made with the given facts.

        Args:
            facts: facts of another run.
            what: description of the other run, for the message.

        Raises:
            DataError: for the first fact that differs.

        """
        _check_same(self.facts, facts, what)

    def digest(self) -> str:
        """Compute a digest that identifies the run: its sequence, recipe, anchors, facts, and final parameters.

        Returns:
            32 hexadecimal characters.

        """
        flat = (p.detach().cpu().reshape(-1) for p in self.end.params.values())
        ends = b"".join(p.view(torch.uint8).numpy().tobytes() for p in flat)
        said = [self.sequence, self.recipe.describe(), [a.position for a in self.anchors], dict(self.facts)]
        return files.digest(files.json_bytes(said) + files.digest(ends).encode())

    def save(self, folder: files.PathLike) -> None:
        """Write `anchor-NNNNN.safetensors` and, last, `meta.json`.

        Args:
            folder: folder to write to; created if missing.

        Raises:
            EnvironmentProblem: if the file system reports an error, such as a full disk.

        """
        folder = files.make_folder(folder)
        for anchor in self.anchors:
            save_anchor(folder, anchor)
        sealed.write_json(
            folder / "meta.json",
            {
                "format": _FORMAT,
                "sequence": list(self.sequence),
                "recipe": self.recipe.describe(),
                "anchors": [anchor.position for anchor in self.anchors],
                "shapes": {name: list(p.shape) for name, p in self.start.params.items()},
                "facts": dict(self.facts),
            },
        )

    @classmethod
    def load(cls, folder: files.PathLike, device: torch.device | str = "cpu") -> ReferenceRun:
        """Read a run that `save` wrote.

        Args:
            folder: the folder.
            device: device of the parameters.

        Returns:
            The run.

        Raises:
            DataError: if a file is missing or damaged; the message names it.

        """
        folder = Path(folder)
        meta = sealed.read_json(folder / "meta.json")
        try:
            if meta["format"] != _FORMAT:
                raise DataError(
                    f"{folder}: the reference run has format {meta['format']}, but this version reads {_FORMAT}; "
                    "record it again"
                )
            recipe = Recipe.from_description(meta["recipe"])
            anchors = tuple(load_anchor(folder, position, recipe, device) for position in meta["anchors"])
            return cls(tuple(meta["sequence"]), recipe, anchors, meta["facts"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'meta.json'} is damaged ({error!r}); record the reference run again") from error


def _check_same(known: Mapping[str, Any], facts: Mapping[str, Any], what: str) -> None:
    for name in sorted(set(known) | set(facts)):
        if known.get(name) != facts.get(name):
            raise DataError(
                f"the reference run was recorded with another {name} than {what}: {known.get(name)!r} instead of "
                f"{facts.get(name)!r}; record it again"
            )


def record(
    problem: Problem,
    recipe: Recipe,
    sequence: Sequence[int],
    params: Params,
    states: States | None = None,
    *,
    anchors: int = 3,
    folder: files.PathLike | None = None,
    facts: Mapping[str, Any] | None = None,
    observe: Callable[[int], None] | None = None,
    damaged: Callable[[DataError], object] | None = None,
) -> ReferenceRun:
    """Train in the reference order and keep anchors. With `folder`, a killed recording resumes from its last anchor.

    Args:
        problem: the batches and their loss.
        recipe: how parameters are updated, with one learning rate per position.
        sequence: the reference order.
        params: name -> [*shape], floating dtype, at the start of the run.
        states: optimizer states of a run that was warmed up before; new ones by default.
        anchors: number of anchors, spread over the run including both ends.
        folder: where anchors are written.
        facts: what the run is made with (model, data, code); a folder with other facts is refused.
        observe: called with the position before each step, and after the last.
        damaged: called with an error for each damaged file in the folder; the run then resumes from the anchor before
            it. By default such a file is an error.

    Returns:
        The run.

    Raises:
        UsageError: if the sequence does not match the recipe or the problem.
        DataError: if the folder contains another reference run.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> again = record(problem, reference.recipe, reference.sequence, reference.start.params, anchors=3)
        >>> [anchor.position for anchor in again.anchors]
        [0, 2, 4]

    """
    if len(sequence) != len(recipe.rates):
        raise UsageError(
            f"order: {len(sequence)} steps but {len(recipe.rates)} learning rates; expected one per position"
        )
    wrong = [b for b in sequence if not 0 <= b < len(problem.batches)]
    if wrong:
        raise UsageError(f"order: batch {wrong[0]} does not exist; there are {len(problem.batches)}")
    positions = anchor_positions(len(sequence), anchors)
    wanted = {
        "sequence": list(sequence),
        "recipe": recipe.describe(),
        "anchors": positions,
        "facts": dict(facts or {}),
    }
    kept: dict[int, Anchor] = {}
    if folder is not None:
        folder = files.make_folder(folder)
        kept = _recorded(folder, wanted, recipe, next(iter(params.values())).device, damaged)
        if len(kept) == len(positions) and _is_sound(folder / "meta.json", damaged):
            return ReferenceRun(tuple(sequence), recipe, tuple(kept[p] for p in positions), dict(facts or {}))
        sealed.write_json(folder / "plan.json", wanted)
    check_repeatable(problem, params, sequence[0])
    newest = kept[max(kept)] if kept else Anchor(0, params, recipe.init(params) if states is None else states)

    def keep(position: int, now: Params, state: States) -> None:
        if observe is not None:
            observe(position)
        if position in positions and position not in kept:
            kept[position] = Anchor(position, now, state)
            if folder is not None:
                save_anchor(folder, kept[position])

    train(problem, recipe, sequence, newest.params, newest.states, start=newest.position, observe=keep)
    run = ReferenceRun(tuple(sequence), recipe, tuple(kept[p] for p in positions), dict(facts or {}))
    if folder is not None:
        run.save(folder)
    return run


def _recorded(
    folder: Path,
    wanted: Mapping[str, Any],
    recipe: Recipe,
    device: torch.device,
    damaged: Callable[[DataError], object] | None,
) -> dict[int, Anchor]:
    """Read the anchors of an earlier recording of the same run, up to the first that is missing or damaged."""
    kept: dict[int, Anchor] = {}
    plan = folder / "plan.json"
    if not plan.is_file():
        return kept
    try:
        known = sealed.read_json(plan)
        _check_same(known.get("facts", {}), dict(wanted["facts"]), "this run's")
        if known != json.loads(files.json_bytes(wanted)):
            raise DataError(f"{folder} contains another reference run, or part of one; choose another folder")
        for position in wanted["anchors"]:
            if not anchor_path(folder, position).is_file():
                break
            kept[position] = load_anchor(folder, position, recipe, device)
    except sealed.Damaged as error:
        if damaged is None:
            raise
        damaged(error)
    return kept


def _is_sound(path: Path, damaged: Callable[[DataError], object] | None) -> bool:
    """Return whether a file exists and matches its seal."""
    try:
        return path.is_file() and bool(sealed.read_json(path))
    except sealed.Damaged as error:
        if damaged is None:
            raise
        damaged(error)
        return False
