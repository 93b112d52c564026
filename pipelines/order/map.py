"""The task `map`: the effect of a batch's position on its own loss and on the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from datatools import files, order
from datatools.files import sealed
from pipelines.order.cost import positions_of, used
from pipelines.order.estimate import depends_on, surrogate
from pipelines.order.kept import kept, reference
from pipelines.order.setting import Setting
from pipelines.runs.messages import say
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed


def draw_map(setting: Setting) -> None:
    """Run the task `map`, with one file per batch, so that a killed run is continued.

    Args:
        setting: The setting of the run.
    """
    config = setting.config
    run_ = reference(setting)
    chosen = list(dict.fromkeys(setting.sequence))
    rng = np.random.default_rng(derive_seed(config.seed, "order", "map"))
    batches = sorted(int(b) for b in rng.choice(chosen, size=min(config.map_batches, len(chosen)), replace=False))
    if by := used(config):
        made = surrogate(setting, by[0])
        assert hasattr(made, "final")
        final = made.final
    else:

        def final(sequence: Sequence[int | None]) -> order.Params:
            return order.train(setting.problem, setting.recipe, sequence, run_.start.params, run_.start.states)[0]

    positions = positions_of(setting)
    runs = len(batches) * config.completions * (positions + 1)
    say(f"map: {runs} runs of {len(setting.sequence)} steps by {config.map_by}")
    parts = []
    with setting.run.stage("map"), progress("map", runs, "runs") as bar:
        for batch in batches:
            asked = (positions, config.completions, [depends_on(setting, name) for name in used(config)])
            path = setting.kept("maps", f"{config.map_by}-{batch}-", *asked, "rows")
            part = kept(path)
            if part is None:
                found = order.memory_map(
                    setting.sequence, final, setting.problem.train_loss, setting.problem.held_out_loss,
                    batches=[batch], positions=positions, completions=config.completions,
                    seed=derive_seed(config.seed, "order", "map"), row_losses=setting.row_losses,
                    advance=bar.advance,
                )  # fmt: skip
                files.make_folder(path.parent)
                part = {
                    "batch": batch, "source": setting.sources[batch], "positions": list(found.positions),
                    "memory": found.memory[0].tolist(), "held_out": found.held_out[0].tolist(),
                    "spread": found.spread[0].tolist(), "effect": found.position_effect[0].tolist(),
                    "without_memory": float(found.without_memory[0]),
                    "without_held_out": float(found.without_held_out[0]),
                    "counterfactual": float(found.counterfactual[0]),
                    "rows": _rows(setting.plan.batches[batch], found.rows[0]),
                }  # fmt: skip
                sealed.write_json(path, part)
            else:
                bar.advance(config.completions * (positions + 1))
            parts.append(part)
    whole = {"by": config.map_by, "completions": config.completions, "rows": parts}
    sealed.write_json(setting.run.path("map.json"), whole)
    for part in parts:
        late = part["effect"][-1] - part["effect"][0]
        say(
            f"  batch {part['batch']} ({part['source']}): training on it lowers its loss by "
            f"{part['counterfactual']:.4f}; last instead of first: {late:+.4f}"
        )
    rows = [row for part in parts for row in part["rows"]]
    most, lost = (max(rows, key=lambda row: float(row[key])) for key in ("memorised", "forgotten"))
    say(
        f"  memorised most: row {most['id']}, by {most['memorised']:.4f}{_error(most['memorised_error'])}; forgotten "
        f"most: row {lost['id']}, by {lost['forgotten']:.4f}{_error(lost['forgotten_error'])}, trained on first "
        "instead of last"
    )


def _rows(names: Sequence[str], losses: Tensor) -> list[dict[str, Any]]:
    """Return what the map says of each row of a batch.

    `memorised` is how much lower its loss is because the batch was trained on, at any position, and `forgotten` how
    much higher if that was first instead of last; with standard errors over completions, None if there is one.

    Args:
        names: The ids of the rows.
        losses: The losses of the rows [positions + 1, completions, rows]; the last are those without the batch.
    """
    trained, without = losses[:-1], losses[-1]
    memorised, forgotten = without - trained.mean(0), trained[0] - trained[-1]

    def error(values: Tensor, row: int) -> float | None:
        return float(values[:, row].std()) / len(values) ** 0.5 if len(values) > 1 else None

    return [
        {
            "id": name, "memory": trained[:, :, i].mean(1).tolist(), "without": float(without[:, i].mean()),
            "memorised": float(memorised[:, i].mean()), "memorised_error": error(memorised, i),
            "forgotten": float(forgotten[:, i].mean()), "forgotten_error": error(forgotten, i),
        }
        for i, name in enumerate(names)
    ]  # fmt: skip


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.1g}"
