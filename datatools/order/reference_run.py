"""A recorded run with its anchors: parameters and optimizer states at a few of its steps."""

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
from datatools.order.problem import Params, Problem, check_repeatable
from datatools.order.recipe import Recipe, States, train
from optim import Optimizer, UpdateMap

_FORMAT = 2  # 1 had no seals


@dataclass(frozen=True)
class Anchor:
    """Parameters and optimizer states before the step at `position` (T: after the last)."""

    position: int
    params: Params
    states: States


@dataclass(frozen=True)
class ReferenceRun:
    """One recorded run: its sequence of batches, its recipe, and anchors of which the first and the last are the ends.

    facts: what it was made with (model, data, code); `check_same` refuses another's.
    """

    sequence: tuple[int, ...]
    recipe: Recipe
    anchors: tuple[Anchor, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Anchor:
        """Where training begins."""
        return self.anchors[0]

    @property
    def end(self) -> Anchor:
        """What the reference order ended with."""
        return self.anchors[-1]

    def nearest(self, position: float) -> Anchor:
        """The anchor whose position is nearest."""
        return min(self.anchors, key=lambda anchor: (abs(anchor.position - position), anchor.position))

    def check(self, sequence: Sequence[int]) -> None:
        """Raise UsageError unless `sequence` is a permutation of the reference's."""
        check_permutation(sequence, self.sequence)

    def check_same(self, facts: Mapping[str, Any], what: str = "this run") -> None:
        """Raise DataError, naming the first fact that differs, unless the reference was made with the same."""
        _check_same(self.facts, facts, what)

    def digest(self) -> str:
        """What tells this run from another: its sequence, recipe, anchors, facts, and the parameters it ended with."""
        flat = (p.detach().cpu().reshape(-1) for p in self.end.params.values())
        ends = b"".join(p.view(torch.uint8).numpy().tobytes() for p in flat)
        said = [self.sequence, self.recipe.describe(), [a.position for a in self.anchors], dict(self.facts)]
        return files.digest(files.json_bytes(said) + files.digest(ends).encode())

    def save(self, folder: files.PathLike) -> None:
        """Write `anchor-NNNNN.safetensors` and, last, `meta.json`."""
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
        """Read what `save` wrote, to a device.

        Raises:
            DataError: when something is missing or damaged; it is named.
        """
        folder = Path(folder)
        meta = sealed.read_json(folder / "meta.json")
        try:
            if meta["format"] != _FORMAT:
                raise DataError(f"{folder}: a reference run of format {meta['format']}, this version reads {_FORMAT}")
            recipe = Recipe.from_description(meta["recipe"])
            anchors = tuple(load_anchor(folder, position, recipe, device) for position in meta["anchors"])
            return cls(tuple(meta["sequence"]), recipe, anchors, meta["facts"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'meta.json'} is damaged ({error!r}); record the reference run again") from error


def _check_same(known: Mapping[str, Any], facts: Mapping[str, Any], what: str) -> None:
    for name in sorted(set(known) | set(facts)):
        if known.get(name) != facts.get(name):
            raise DataError(
                f"the reference run was recorded with another {name} than {what}: {known.get(name)!r} there, "
                f"{facts.get(name)!r} here; record it again"
            )


def anchor_path(folder: Path, position: int) -> Path:
    """Where the anchor of a position stands."""
    return folder / f"anchor-{position:05d}.safetensors"


def save_anchor(folder: Path, anchor: Anchor) -> None:
    """Write one anchor, whole or not at all."""
    tensors = {f"param/{name}": p for name, p in anchor.params.items()}
    for name, state in anchor.states.items():
        tensors |= {f"state/{name}/{key}": value for key, value in state.items()}
    sealed.write_tensors(anchor_path(folder, anchor.position), tensors)


def load_anchor(folder: Path, position: int, recipe: Recipe, device: torch.device | str = "cpu") -> Anchor:
    """Read one anchor, to a device; its states go where the rule makes them.

    Raises:
        DataError: when it is missing, damaged, or lacks parameters or states of the recipe.
    """
    path = anchor_path(folder, position)
    tensors = sealed.read_tensors(path)
    params = {name: tensors[f"param/{name}"].to(device) for name in recipe.rules if f"param/{name}" in tensors}
    missing = [name for name in recipe.rules if name not in params]
    states: States = {}
    for name, rule in recipe.rules.items():
        if name in params:
            keys = rule.init(params[name])
            at = {k: f"state/{name}/{k}" for k in keys}
            states[name] = {k: tensors[at[k]].to(fresh.device) for k, fresh in keys.items() if at[k] in tensors}
            missing += [f"{name}/{key}" for key in keys if key not in states[name]]
    if missing:
        raise DataError(
            f"{path} lacks {missing[0]!r} (and {len(missing) - 1} more): a reference run needs the parameters and the "
            "optimizer states of every anchor; record it again"
        )
    return Anchor(position, params, states)


def anchor_positions(steps: int, anchors: int) -> list[int]:
    """`anchors` positions spread evenly over 0..steps, both ends among them."""
    if not 2 <= anchors <= steps + 1:
        raise UsageError(f"order: {anchors} anchors for {steps} steps; expected 2 to {steps + 1}")
    return sorted({round(i * steps / (anchors - 1)) for i in range(anchors)})


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
    """Train in the reference order and keep the anchors; with `folder`, a killed recording goes on at its last one.

    Args:
        problem: the batches and their loss.
        recipe: how parameters step; one learning rate per position.
        sequence: the reference order.
        params: name -> [*shape], float; where the run begins.
        states: of a run that was warm before; fresh ones if not given.
        anchors: how many are kept, spread over the run with both ends among them.
        folder: where they are written.
        facts: what the run was made with (model, data, code); a folder with others is refused.
        observe: called with the position before each step, and after the last.
        damaged: told of a file in the folder that is not what was written; the run goes on from the anchor before it.
            Without it such a file is an error.

    Raises:
        UsageError: for a sequence that does not fit.
        DataError: for a folder that holds another reference run.

    Example:
        >>> from datatools.order.example import example_run
        >>> problem, reference = example_run()
        >>> again = record(problem, reference.recipe, reference.sequence, reference.start.params, anchors=3)
        >>> [anchor.position for anchor in again.anchors]
        [0, 2, 4]
    """
    if len(sequence) != len(recipe.rates):
        raise UsageError(f"order: {len(sequence)} steps and {len(recipe.rates)} learning rates; one a position")
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
    """The anchors that an earlier process kept of the run `wanted`, up to the first that is missing or damaged."""
    kept: dict[int, Anchor] = {}
    plan = folder / "plan.json"
    if not plan.is_file():
        return kept
    try:
        known = sealed.read_json(plan)
        _check_same(known.get("facts", {}), dict(wanted["facts"]), "this run's")
        if known != json.loads(files.json_bytes(wanted)):
            raise DataError(f"{folder} holds another reference run, or a part of one; choose another folder")
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
    """Whether a file is there, and holds what was written."""
    try:
        return path.is_file() and bool(sealed.read_json(path))
    except sealed.Damaged as error:
        if damaged is None:
            raise
        damaged(error)
        return False


def snapshot(optimizer: Optimizer, position: int) -> Anchor:
    """An anchor of a run that trains in place (a `Trainer`): copies of parameters and states."""
    found = UpdateMap.of(optimizer)
    return Anchor(position, dict(found.params), {name: dict(state) for name, state in found.states.items()})
