"""Sampling weights for the sources of a pool, from a selection: `weights.yaml`, in the forms that trainers read.

For a source s with n_s of the pool's N rows, of which the selection took k_s of K:

    selection:  w_s = k_s / K
    scores:     w_s = n_s exp(z_s / T) / sum over sources,  z_s = (mean score of s - mean of all) / standard deviation
    p_s = (1 - f) w_s + f n_s / N

`f` (mixture.floor) keeps some of the pool's own mixture, so that no source vanishes; `T` is mixture.temperature: at a
high one, p is the pool's own mixture. Rows without a score count in n_s and not in the mean.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from datatools import Selection, files
from datatools.compact import Names
from pipelines.runs.redact import redact
from pipelines.select.scored import Context, Scored
from pipelines.settings.select import MixtureConfig

NAME = "weights.yaml"
_HEAD = """\
# Sampling weights for the sources of the pool, as this selection suggests them. {formula}
# They say which sources the selection preferred, not that training on this mixture is better: drawing from a source
# gives its average rows and not the chosen ones, and nobody has trained on it yet. Compare with the pool's own mixture
# (pool_share) on held-out rows before you rely on it.
"""
_FORMULA = {
    "selection": "The weight of a source is {rest:g} x its share of the selection + {floor:g} x its share of the pool.",
    "scores": "The weight of a source is {rest:g} x (its share of the pool x exp(z / {temperature:g}), normalised) + "
    "{floor:g} x its\n# share of the pool; z is its mean score in standard deviations of all rows.",
}


def weights(
    sources: Sequence[str], chosen: Sequence[int], scores: Sequence[float] | NDArray[Any] | None, how: MixtureConfig
) -> dict[str, dict[str, Any]]:
    """Return, per source, what is known of it and its `weight`; the weights sum to 1, the largest comes first.

    Args:
        sources: The source of each usable row of the pool.
        chosen: The positions in `sources` of the selected rows.
        scores: The score of each usable row, NaN for a row without one; None if the method computes no scores.
        how: The formula and its settings.

    Examples:
        >>> found = weights(["a", "a", "b", "b"], [0, 1], None, MixtureConfig(floor=0.2))
        >>> {name: one["weight"] for name, one in found.items()}
        {'a': 0.9, 'b': 0.1}
    """
    all_ = Names.of(sources)
    rows, taken = all_.counts(), Counter(all_[i] for i in chosen)
    of: dict[str, NDArray[np.float64]] = {name: np.zeros(0) for name in rows}
    every = np.zeros(0)
    if scores is not None:
        known = np.asarray(scores, np.float64)
        there = np.isfinite(known)
        of = {name: known[all_.where(name) & there] for name in rows}
        every = np.concatenate([of[name] for name in dict.fromkeys(Names(all_.codes[there], all_.names)) or rows])
    spread = float(every.std()) if len(every) else 0.0
    z = {s: (float(np.mean(of[s])) - float(every.mean())) / spread if len(of[s]) and spread else 0.0 for s in rows}
    names = sorted(rows)
    pool = np.asarray([rows[s] for s in names], dtype=np.float64) / len(sources)
    if how.weights == "scores":
        exponents = np.asarray([z[s] for s in names]) / how.temperature
        raw = pool * np.exp(exponents - exponents.max())
    else:
        raw = np.asarray([taken[s] for s in names], dtype=np.float64)
    p = _rounded((1 - how.floor) * raw / raw.sum() + how.floor * pool)
    found = {
        name: {
            "weight": weight,
            "pool_share": round(float(share), 6),
            "pool_rows": rows[name],
            "selected_rows": taken[name],
            "selected_share": round(taken[name] / max(1, len(chosen)), 6),
            "mean_score": round(float(np.mean(of[name])), 6) if len(of[name]) else None,
            "mean_score_z": round(z[name], 4) if len(of[name]) else None,
        }
        for name, weight, share in zip(names, p, pool, strict=True)
    }
    return {name: found[name] for _, name in sorted(zip([-weight for weight in p], names, strict=True))}


def _rounded(p: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Return `p` with six digits and the exact sum 1, which numpy requires when `interleave_datasets` draws."""
    units = np.floor(p / p.sum() * 1_000_000)
    for place in np.argsort(-(p / p.sum() * 1_000_000 - units), kind="stable")[: int(1_000_000 - units.sum())]:
        units[place] += 1
    return [float(unit) / 1_000_000 for unit in units]


def forms(found: Mapping[str, Mapping[str, Any]], paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the weights in the forms that trainers read; the page on mixtures says where each part belongs.

    Args:
        found: As `weights` returns it.
        paths: Source -> the file that contains only rows of this source, if there is one.
    """
    names = [name for name, one in found.items() if one["weight"] > 0]
    p = [found[name]["weight"] for name in names]
    # axolotl's weight is the share of a data set to keep: the data set with the highest weight per row is kept whole
    wanted = [found[name]["weight"] / found[name]["pool_rows"] for name in names]
    kept = [max(1e-6, round(one / max(wanted), 6)) for one in wanted]
    made: dict[str, Any] = {
        "interleave_datasets": {
            "datasets": names,
            "probabilities": p,
            "stopping_strategy": "first_exhausted",
        },
        "axolotl": {
            "datasets": [
                {"path": paths.get(name, name), "weight": share} for name, share in zip(names, kept, strict=True)
            ]
        },
    }
    if not any("," in name for name in names):  # the separator of that setting
        made["llama_factory"] = {
            "dataset": ",".join(names),
            "mix_strategy": "interleave_under",
            "interleave_probs": ",".join(f"{weight:g}" for weight in p),
        }
    return made


def write(path: Path, context: Context, scored: Scored, selection: Selection) -> dict[str, dict[str, Any]]:
    """Write `weights.yaml`, and return the weights.

    Args:
        path: The file to write.
        context: What was scored.
        scored: The scores.
        selection: The selected rows.

    Returns:
        As `weights` returns it.
    """
    pool, how = context.pool, context.config.mixture
    usable = np.flatnonzero(pool.usable)
    names, paths_of = pool.pool.sources, pool.pool.names
    some = bool(scored.scores.isfinite().any())
    found = weights(
        Names(names.codes[usable], names.names),
        np.searchsorted(usable, selection.indices.numpy()).tolist(),
        scored.scores.numpy()[usable] if some else None,
        how,
    )
    of_file: dict[str, set[str]] = defaultdict(set)
    in_file: dict[str, set[str]] = defaultdict(set)
    pairs = np.unique(np.stack([paths_of.codes[usable], names.codes[usable]]), axis=1)
    for file, source in pairs.T.tolist():
        of_file[paths_of.names[file]].add(names.names[source])
        in_file[names.names[source]].add(paths_of.names[file])
    alone = {s: redact(next(iter(held))) for s, held in in_file.items() if len(held) == 1}
    paths = {s: file for s, file in alone.items() if len(of_file[next(iter(in_file[s]))]) == 1}
    head = _HEAD.format(
        formula=_FORMULA[how.weights].format(rest=1 - how.floor, floor=how.floor, temperature=how.temperature)
    )
    body = yaml.safe_dump(
        {"sources": found, **forms(found, paths)},
        allow_unicode=True,
        sort_keys=False,
        width=120,
        default_flow_style=None,
    )
    files.write_text(path, head + body)
    return found
