"""`datatools audit --oracle`: do scores say what training says? Three checks, each by short training runs or swaps.

- Drop: train without the best-scored rows of a sample, without the worst, and without as many random ones.
- Noise: swap the answers of some rows, score again, and see whether the lowest scores are those rows.
- Exact: train on random halves of a few rows (or leave out one row at a time), and correlate with the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datatools import DataError, UsageError, bootstrap_interval, compare, files, spearman, spearman_rows
from datatools.files import sealed
from pipelines.rows.inputs import Inputs
from pipelines.rows.rows import Rows
from pipelines.runs.folder import Run
from pipelines.runs.seeds import derive_seed
from pipelines.select.arms import Scores, Task, as_select, is_scored
from pipelines.select.bench import Result
from pipelines.select.scored import Context
from pipelines.select.scorer import scorer
from pipelines.select.swapped import detected, swap
from pipelines.settings import trust
from pipelines.settings.audit import AuditConfig
from pipelines.settings.load import load_config
from pipelines.settings.methods import known, method
from pipelines.settings.parts import DataConfig
from pipelines.settings.select import SelectConfig

DROP, EXACT = "drop", "exact"
"""Groups of training runs."""
FEWEST = 10
"""The checks need so many usable rows."""
ALL, TOP, BOTTOM, RANDOM = "nothing", "the best-scored rows", "the worst-scored rows", "random rows"


@dataclass
class Oracle:
    """The checks of one audit.

    Attributes:
        config: the settings.
        pool: the rows.
        run: the open run.
        home: the run that made the selection; None where there is none.
        own: the method of that run; None where it has no scores.
        methods: the methods whose scores are checked, that of the selection first.
        read: float64 [n], the scores of the selection's run, a row without a score below all others; None without
            `own`.
        share: how much of the usable rows was selected.
    """

    config: AuditConfig
    pool: Rows
    run: Run
    home: SelectConfig | None
    own: str | None
    methods: list[str]
    read: NDArray[np.float64] | None
    share: float
    _made: tuple[Rows, NDArray[np.bool_]] | None = None

    # ------------------------------------------------------------------------------------------------------- the rows

    @property
    def sample(self) -> list[int]:
        """The rows of the pool that drop and noise use."""
        return self._drawn(self.config.oracle_checks.rows, "sample")

    @property
    def few(self) -> list[int]:
        """The rows that the exact check uses."""
        return self._drawn(self.config.oracle_checks.exact_rows, "exact")

    def _drawn(self, many: int, purpose: str) -> list[int]:
        usable = np.flatnonzero(self.pool.usable)
        generator = np.random.default_rng(derive_seed(self.config.seed, f"oracle {purpose}"))
        return sorted(generator.choice(usable, min(many, len(usable)), replace=False).tolist())

    # ------------------------------------------------------------------------------------------------------ the runs

    def tasks(self, scores: Mapping[str, NDArray[np.float64]]) -> list[Task]:
        """Return all training runs; without scores, runs of the same sizes on other rows, for an estimate.

        Args:
            scores: What `scores` returned; empty for an estimate.
        """
        checks, config, sample = self.config.oracle_checks, self.config, self.sample
        away = max(1, round(checks.drop * len(sample)))
        ranked = list(sample)
        if scores:
            values = scores[self.methods[0]]
            ranked.sort(key=lambda i: (-values[i], i))
        found = []
        for seed in range(config.seed, config.seed + config.seeds):
            generator = np.random.default_rng(derive_seed(seed, "oracle random"))
            gone = set(generator.choice(sample, away, replace=False).tolist())
            parts = {
                ALL: sample,
                TOP: sorted(ranked[away:]),
                BOTTOM: sorted(ranked[: len(ranked) - away]),
                RANDOM: [i for i in sample if i not in gone],
            }
            found += [
                Task(f"without {name}", seed, rows, config.training, "", DROP, not scores and name in (TOP, BOTTOM))
                for name, rows in parts.items()
            ]
        found += [
            Task(f"subset {number}", config.seed, rows, config.training, "", EXACT)
            for number, rows in enumerate(self.subsets(), start=1)
        ]
        return found

    def subsets(self) -> list[list[int]]:
        """Return the rows of each run of the exact check; with leave-one-out, the first run has all of them."""
        checks, few = self.config.oracle_checks, self.few
        if checks.exact == "leave-one-out":
            return [few, *([i for i in few if i != gone] for gone in few)]
        if checks.exact == "none":
            return []
        generator = np.random.default_rng(derive_seed(self.config.seed, "oracle subsets"))
        return [sorted(generator.choice(few, len(few) // 2, replace=False).tolist()) for _ in range(checks.subsets)]

    # ----------------------------------------------------------------------------------------------------- the scores

    def scores(self, arms: Scores) -> dict[str, NDArray[np.float64]]:
        """Return the scores of the pool by each method, float64 [n]; a row without a score is below all others.

        Args:
            arms: The scores of the arms.
        """
        found = {}
        for name in self.methods:
            if name == self.own and self.read is not None:
                found[name] = self.read
            else:
                found[name] = _filled(arms.of(name).scores.double().numpy())
        return found

    def noise_work(self, inputs: Inputs, target: Rows | None, loaded: Any) -> dict[str, tuple[float, bool]]:
        """Return (tokens, whether with gradients) of scoring the swapped rows, by method.

        Args:
            inputs: Where rows are read.
            target: The target rows.
            loaded: The model.
        """
        found = {}
        rows, _ = self._swapped(inputs)
        for name in self.methods:
            context = self._context(name, rows, target, loaded)
            whole = sum(scorer(name).work(context).left.values())
            found[name] = (float(whole), "gradients" in known(name).needs)
        return found

    def noise(self, inputs: Inputs, target: Rows | None, loaded: Any) -> dict[str, Any]:
        """Measure how well the lowest scores of each method find the rows whose answers were swapped.

        Args:
            inputs: Where rows are read.
            target: The target rows.
            loaded: The model.
        """
        table: list[dict[str, Any]] = []
        rows, swapped = self._swapped(inputs)
        usable = np.flatnonzero(rows.usable)
        for name in self.methods:
            context = self._context(name, rows, target, loaded)
            digest = files.digest("\n".join([context.config.model_dump_json(), *rows.keys]).encode())
            path = self.run.path("oracle", f"noise-{name}.json")
            values: list[float] | None = None
            if path.is_file():
                with suppress(sealed.Damaged):
                    kept = sealed.read_json(path)
                    values = kept["scores"] if kept.get("made_of") == digest else None
            if values is None:
                found = scorer(name).score(context)
                values = _filled(found.scores.double().numpy()).tolist()
                files.make_folder(path.parent)
                sealed.write_json(path, {"made_of": digest, "scores": values})
            found_by = detected(np.asarray(values)[usable], swapped[usable])
            table.append({"method": name, "label": _label(name), **found_by})
        best = max(table, key=lambda row: row["auc"])
        count = len(usable)
        share = swapped.sum() / count
        sentence = (
            f"Of {count} rows, {int(swapped.sum())} had their answers swapped; the lowest scores by "
            f"{best['label']} find them best (AUC {best['auc']:.2f}, chance 0.5; {100 * best['precision']:.0f} % of as "
            f"many lowest scores, chance {100 * share:.0f} %)."
        )
        return {"rows": count, "swapped": int(swapped.sum()), "table": table, "sentence": sentence}

    def _swapped(self, inputs: Inputs) -> tuple[Rows, NDArray[np.bool_]]:
        """Return the sample with some answers swapped, as rows, and which rows these are."""
        if self._made is not None:
            return self._made
        path = self.run.path("oracle", "swapped.jsonl")
        lines, gone = swap([self.pool.pool[i] for i in self.sample], self.config.oracle_checks.noise, self._seed)
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.make_folder(path.parent)
        if not path.is_file() or files.read_bytes(path) != content.encode():
            files.write_text(path, content)
        data = DataConfig(paths=[str(path)], on_bad_row="skip")
        rows = inputs.read("swapped rows", data, recorded=False)
        self._made = rows, np.asarray([rows.pool.line(i) - 1 in gone for i in range(len(rows))]) & rows.usable
        return self._made

    @property
    def _seed(self) -> int:
        return derive_seed(self.config.seed, "oracle noise")

    def _context(self, name: str, rows: Rows, target: Rows | None, loaded: Any) -> Context:
        base = self.home if name == self.own and self.home is not None else as_select(self.config, name)
        features = base.features.model_copy(update={"folder": self.run.path("oracle", "features")})
        changes = {
            "features": features,
            "model": self.config.model,
            "seed": self.config.seed,
            "train": self.config.pool,
            "target": self.config.target,
            "target_columns": self.config.target_columns,
            "budget": str(max(1, round(self.share * int(rows.usable.sum())))),  # the sample may be smaller than it was
        }
        return Context(base.model_copy(update=changes), self.run, rows, target, lambda: loaded)

    # ---------------------------------------------------------------------------------------------------- the verdict

    def judged(self, done: Sequence[tuple[Task, Result]], scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
        """Return what `audit.json` says of the checks drop and exact.

        Args:
            done: The training runs of the audit.
            scores: What `scores` returned.
        """
        found: dict[str, Any] = {"methods": self.methods, "drop": self._dropped(done)}
        exact = [result for task, result in done if task.group == EXACT]
        if exact:
            found["exact"] = self._exact(exact, scores)
        return found

    def _dropped(self, done: Sequence[tuple[Task, Result]]) -> dict[str, Any]:
        runs: dict[str, list[Result]] = {}
        for task, result in done:
            if task.group == DROP:
                runs.setdefault(task.arm.removeprefix("without "), []).append(result)
        weights = runs[ALL][0].counts
        values = {name: np.stack([one.sums / weights for one in results]) for name, results in runs.items()}
        table = []
        for name in (ALL, TOP, RANDOM, BOTTOM):
            pair = compare(values[ALL], values[name], weights)
            mean = float((values[name] @ weights / weights.sum()).mean())
            row: dict[str, Any] = {"label": name, "rows": runs[name][0].rows, "mean": mean}
            if name != ALL:
                row |= {"difference": pair.difference, "low": pair.low, "high": pair.high}
            table.append(row)
        change = {row["label"]: row["difference"] for row in table if row["label"] != ALL}
        pair = compare(values[BOTTOM], values[TOP], weights)
        right = change[TOP] > change[RANDOM] > change[BOTTOM]
        clear = len(values[TOP]) > 2 and pair.low > 0
        word = "the order that good scores give" if right else "NOT the order that good scores give"
        sentence = (
            f"By the scores of {_label(self.methods[0])}, training without the best-scored rows changes the held-out "
            f"loss by {change[TOP]:+.4f}, without random rows by {change[RANDOM]:+.4f}, without the worst-scored rows "
            f"by {change[BOTTOM]:+.4f}: {word}; best against worst {pair.difference:+.4f} (95 % {pair.low:.4f} to "
            f"{pair.high:.4f}{'' if clear else ', not told apart'})."
        )
        return {"method": self.methods[0], "table": table, "right": right, "clear": clear, "sentence": sentence}

    def _exact(self, done: Sequence[Result], scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
        losses = np.asarray([one.loss for one in done])
        subsets = self.subsets()
        leaves = self.config.oracle_checks.exact == "leave-one-out"
        truth = losses[1:] - losses[0] if leaves else -losses
        table = []
        for name in self.methods:
            values = scores[name]
            guess = np.asarray(
                [values[i] for i in self.few] if leaves else [float(values[rows].sum()) for rows in subsets]
            )
            found = spearman(guess, truth)
            interval = bootstrap_interval(spearman_rows, guess, truth) or (None, None)
            row = {"method": name, "label": _label(name), "spearman": found, "low": interval[0], "high": interval[1]}
            table.append(row)
        how = (
            f"leaving out each of {len(self.few)} rows"
            if leaves
            else f"training on {len(subsets)} random halves of rows"
        )
        said = ", ".join(
            f"{row['label']} {row['spearman']:.2f}" if row["spearman"] is not None else f"{row['label']} none"
            for row in table
        )
        sentence = f"Rank correlation of scores with {how}: {said}."
        return {"kind": self.config.oracle_checks.exact, "runs": len(done), "table": table, "sentence": sentence}


def oracle(config: AuditConfig, pool: Rows, run: Run, against: Sequence[str], chosen: Sequence[int]) -> Oracle:
    """Make the checks for the scores of the selection's own run and of the arms that are scored.

    Args:
        config: the settings.
        pool: the rows.
        run: the open run.
        against: the arms.
        chosen: the rows of the selection.

    Raises:
        UsageError: Nothing has scores.
        DataError: The pool is too small, or the scores of the selection's run are of another pool.
    """
    usable = int(pool.usable.sum())
    if usable < FEWEST:
        raise DataError(f"--oracle: the pool has {usable} usable rows; the checks need at least {FEWEST}")
    folder = config.selected.parent
    home = own = None
    if (folder / "run.yaml").is_file() and (folder / "scores.parquet").is_file():
        flags = {"out": folder, "model.trust_remote_code": config.model.trust_remote_code or None}
        home = load_config(SelectConfig, folder / "run.yaml", flags, wanted=[trust.CODE])
        record = method(home.method)
        own = home.method if record is not None and is_scored(home.method) else None
    found = [*([own] if own else []), *(arm for arm in against if is_scored(arm) and arm != own)]
    if not found:
        raise UsageError(
            "--oracle: there are no scores to check: the selection has none, and no arm is scored; name one with "
            "--against tfidf"
        )
    scores = _read_scores(folder, pool) if own else None
    return Oracle(config, pool, run, home, own, found, scores, len(chosen) / usable)


def _read_scores(folder: Path, pool: Rows) -> NDArray[np.float64]:
    """The scores of the selection's run, row by row of the pool.

    Raises:
        DataError: They are of another pool.
    """
    path = folder / "scores.parquet"
    try:
        table = pq.read_table(path, columns=["_key", "_score"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; select again to write it anew") from error
    known_scores = dict(zip(table["_key"].to_pylist(), table["_score"].to_pylist(), strict=True))
    missing = [i for i in np.flatnonzero(pool.usable).tolist() if pool.keys[i] not in known_scores]
    if missing:
        raise DataError(
            f"{path} has no score of {pool.pool.where(missing[0])} (and {len(missing) - 1} more rows); give --pool the "
            "files that it was selected from, with the model of that run"
        )
    found = [known_scores.get(key) for key in pool.keys]
    return _filled(np.asarray([np.nan if value is None else value for value in found], dtype=np.float64))


def _filled(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores where a row without one is below all others."""
    good = np.isfinite(scores)
    low = float(scores[good].min()) - 1.0 if good.any() else 0.0
    return np.where(good, scores, low)


def _label(name: str) -> str:
    record = method(name)
    return record.title if record is not None else name
