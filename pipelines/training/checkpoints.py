"""Checkpoints of a warm-up run, ours or the user's: the adapter, the optimizer's state by name, the learning rate.

Trainer's own `optimizer.pt` has no names: its integers count the decayed parameters first, then the others. The names
are restored in that order, and every shape is checked. Which parameters were trained is read from the saved files: an
adapter's file, the names in the state, or else the only choice that fits. `training_args.bin` is never read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datatools import DataError, UsageError, files
from optim import AdamWRule, UpdateMap, UpdateRule, bare_name, without_decay
from pipelines.models import load as models
from pipelines.models import saved_states
from pipelines.models.adapters import adapter_folder, load_adapter, saved_parameters
from pipelines.models.base import unload
from pipelines.models.lora import lora_parameters
from pipelines.settings.parts import ModelConfig
from pipelines.training.checkpoint_files import COMPLETE, is_complete


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its folder, its optimizer step, and how much it counts.

    Attributes:
        mean_lr: The mean learning rate since the previous checkpoint.
        weight: The weight in the score.
    """

    folder: Path
    step: int
    mean_lr: float
    weight: float

    @property
    def is_adapter(self) -> bool:
        """Whether it contains LoRA matrices rather than a whole model."""
        return adapter_folder(self.folder) is not None

    def digests(self) -> dict[str, str]:
        """Return file name -> hash of the weights and the optimizer state."""
        home = adapter_folder(self.folder)
        paths = [*self.folder.glob("*.safetensors"), *(home.glob("*.safetensors") if home else ())]
        for held in (saved_states.find(self.folder), saved_states.weights(self.folder)):
            if held is not None:
                paths += [p for p in held.rglob("*") if p.is_file()] if held.is_dir() else [held]
        found = {str(path.relative_to(self.folder)): files.digest_file(path) for path in sorted(set(paths))}
        if home is not None:  # the relevant part of peft's file, whose lists have no fixed order
            config = files.read_json(home / "adapter_config.json")
            kept = {key: sorted(map(str, v)) if isinstance(v, list) else v for key, v in config.items()}
            for key in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
                kept.pop(key, None)
            found["adapter_config"] = files.digest(files.json_bytes(kept))
        return found


def find(paths: Sequence[Path]) -> list[Checkpoint]:
    """Return the checkpoints in some folders, by step.

    The weight of a checkpoint is the mean learning rate of the optimizer steps since the previous one (`log_history`
    of `trainer_state.json`), divided by the sum over checkpoints.

    Args:
        paths: Checkpoint folders, or folders of runs, ours or Trainer's, that contain checkpoints.

    Raises:
        UsageError: There is no checkpoint.
        DataError: A folder has no optimizer state or no logged learning rates, or it was damaged.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"--checkpoints {path}: no such folder")
        folders += _inside(path) or _inside(path / "checkpoints") or _inside(path / "warmup") or [path]
    for folder in folders:
        if (folder / COMPLETE).is_file() and not is_complete(folder):
            raise DataError(
                f"checkpoint {folder}: a file differs from {COMPLETE}; train again from the "
                "previous checkpoint, or leave this one out"
            )
    states = {folder: _trainer_state(folder) for folder in folders}
    ordered = sorted(set(folders), key=lambda folder: int(states[folder]["global_step"]))
    found: list[tuple[Path, int, float]] = []
    before = 0
    for folder in ordered:
        step = int(states[folder]["global_step"])
        rates = _rates(folder, states[folder], before, step)
        if not rates:
            raise DataError(
                f"checkpoint {folder}: trainer_state.json logs no learning rate for steps {before + 1} to {step}; "
                "train with logging_steps=1, or give checkpoints further apart"
            )
        found.append((folder, step, sum(rates) / len(rates)))
        before = step
    total = sum(rate for _, _, rate in found)
    if total == 0 or not math.isfinite(total):
        said = "0" if total == 0 else "too large"
        raise DataError(f"checkpoints {[str(f) for f in ordered]}: every logged learning rate is {said}")
    return [Checkpoint(folder, step, rate, rate / total) for folder, step, rate in found]


def _inside(path: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, without our own that a kill left incomplete."""
    found = [p for p in path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    ours = [p for p in found if (p / COMPLETE).is_file()]
    return ours or found


def _trainer_state(folder: Path) -> dict[str, Any]:
    if saved_states.find(folder) is None:
        raise DataError(f"checkpoint {folder}: {saved_states.refusal(folder)}")
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise DataError(f"checkpoint {folder}: trainer_state.json is missing, so its learning rate is unknown")
    state = files.read_json(path)
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise DataError(f"{path}: not a Trainer's state: `global_step` is missing or is not a number of steps")
    return state


def _rates(folder: Path, state: Mapping[str, Any], before: int, step: int) -> list[float]:
    """Return the learning rates that were logged after step `before`, up to `step`.

    Raises:
        DataError: A value is not a learning rate.
    """
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise DataError(f"{folder / 'trainer_state.json'}: `log_history` is not a list of objects")
    rates = []
    for number, entry in enumerate(history, start=1):
        if "learning_rate" not in entry:
            continue
        at, rate = entry.get("step"), entry["learning_rate"]
        if not isinstance(at, int) or isinstance(at, bool):
            raise DataError(
                f"{folder / 'trainer_state.json'}: entry {number} of `log_history` has step {json.dumps(at)[:40]}; "
                "expected a whole number"
            )
        if not before < at <= step:
            continue
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not (math.isfinite(rate) and rate >= 0):
            raise DataError(
                f"{folder / 'trainer_state.json'}: the learning rate of step {at} is {json.dumps(rate)[:40]}; LESS "
                "weights checkpoints by it; write the rate that was used, or leave the checkpoint out"
            )
        rates.append(float(rate))
    return rates


@contextmanager
def at(checkpoint: Checkpoint, config: ModelConfig, model: Any) -> Iterator[Any]:
    """Yield the model at a checkpoint: `model` with the adapter, which is removed afterwards, or a separate model.

    Args:
        checkpoint: The checkpoint.
        config: The configuration from which `model` was loaded.
        model: The base model.

    Raises:
        DataError: The checkpoint does not fit the model.
    """
    if not checkpoint.is_adapter:
        if any(checkpoint.folder.glob("adapter_model.*")):
            raise DataError(f"checkpoint {checkpoint.folder}: contains an adapter without its adapter_config.json")
        yield models.load(config, weights=checkpoint.folder).model
        return
    module = load_adapter(model, checkpoint.folder)
    try:
        yield module
    finally:
        unload(module)


def updates(
    checkpoint: Checkpoint,
    params: Mapping[str, Tensor],
    *,
    adam_mode: str = "paper",
    module: nn.Module | None = None,
    base: nn.Module | None = None,
) -> UpdateMap:
    """Return the optimizer at a checkpoint as a map from gradients to updates, for the parameters that it trained.

    Args:
        checkpoint: The checkpoint.
        params: The parameters that may have been trained (`trainable`). The names in the state decide; without names,
            its number of entries, their shapes, and `base` do.
        adam_mode: "paper" is the optimizer's own rule. "code" is LESS's published one (eps 1e-8 inside the root, no
            bias correction, betas 0.9 and 0.999). "precond_only" is g / (sqrt(v^) + eps). The last two need AdamW's
            state.
        module: The model; needed for a state without names if the model has `nn.LayerNorm` layers, which Trainer
            recognises by their type.
        base: The model at the start of training: weights that differ from it were trained.

    Raises:
        DataError: The state is not readable without unpickling, does not fit the parameters by name and shape, or does
            not show which of them it belongs to.
    """
    path = saved_states.find(checkpoint.folder)
    if path is None:
        raise DataError(f"checkpoint {checkpoint.folder}: {saved_states.refusal(checkpoint.folder)}")
    saved = saved_states.read(path)
    try:
        named, trained = _with_names(saved, params, module, base)
        found = UpdateMap.from_state_dict(named, trained)
        rules = {name: _in_mode(rule, adam_mode) for name, rule in found.rules.items()}
        if rules != dict(found.rules):
            found = UpdateMap.from_state_dict(named, trained, rules=rules)
        _try(found, saved)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path}: does not fit the model: {error}") from error
    return found


def _try(found: UpdateMap, saved: Mapping[str, Any]) -> None:
    """Refuse a state that gives no update: settings of a wrong kind, or moments that were never written.

    It is tried on the smallest parameter.

    Raises:
        ValueError: The state gives no update; the rule may raise other errors.
    """
    if not found.params:
        return
    name = min(found.params, key=lambda n: found.params[n].numel())
    if not saved["state"] and found.rules[name].init(found.params[name]):
        raise ValueError(f"it contains no state of any parameter, but {found.rules[name].name!r} needs one")
    update = found({name: torch.zeros_like(found.params[name], dtype=torch.float32)})[name]
    if not update.isfinite().all():
        raise ValueError(f"the update of {name!r} for a gradient of zeros is not finite")


def _in_mode(rule: UpdateRule, mode: str) -> UpdateRule:
    if mode == "paper":
        return rule
    if not isinstance(rule, AdamWRule):
        raise ValueError(
            f"features.adam_mode={mode!r} needs AdamW, but this state belongs to {rule.name!r}; use 'paper'"
        )
    if mode == "code":
        return AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False)
    if mode == "precond_only":
        return dataclasses.replace(rule, betas=(0.0, rule.betas[1]))
    raise ValueError(f"features.adam_mode={mode!r}; choose paper, code or precond_only")


def _with_names(
    saved: Mapping[str, Any], params: Mapping[str, Tensor], module: nn.Module | None, base: nn.Module | None
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return `saved` with `param_names` in its groups, and the parameters that it belongs to.

    The names of an integer-keyed state are restored in Trainer's order.
    """
    groups = saved["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if any("param_names" in group for group in groups) or not all(isinstance(key, int) for key in keys):
        names = {bare_name(str(n)) for group in groups for n in group.get("param_names", group["params"])}
        kept = {name: p for name, p in params.items() if bare_name(name) in names}
        return saved, kept if len(kept) == len(names) else dict(params)
    parts = [list(params)]
    if len(groups) > 1:
        spared = without_decay(params, module)
        parts = [[n for n in params if n not in spared], [n for n in params if n in spared]]
    if len(groups) > 2:  # in Trainer's order, if it has one
        groups, parts = [{**groups[0], "params": keys}], [[name for part in parts for name in part]]
    if base is None and len(keys) != len(params):
        raise ValueError(f"it contains {len(keys)} parameters without names, but the model trains {len(params)}")
    if len(keys) > len(params) and module is not None and saved_parameters(module):
        raise ValueError(
            f"it contains {len(keys)} parameters, but the adapter's file {len(params)}: the run trained weights it "
            "did not save, so the model of this checkpoint is lost; name them in modules_to_save and train again"
        )
    states = [[saved["state"].get(key, {}) for key in group["params"]] for group in groups]
    moved = _moved(params, base) if len(keys) != len(params) else set()
    order = [
        name for part, of in zip(parts, states, strict=True) for name in _those_of(part, of, params, moved, len(keys))
    ]
    rest = iter(order)
    named = [{**group, "param_names": [next(rest) for _ in group["params"]]} for group in saved["param_groups"]]
    return {"state": saved["state"], "param_groups": named}, {name: params[name] for name in params if name in order}


def _moved(params: Mapping[str, Tensor], base: nn.Module | None) -> set[str]:
    """Return the parameters whose weights differ from the model at the start of training."""
    start = {} if base is None else dict(base.named_parameters())
    return {
        name
        for name, p in params.items()
        if name in start and not (p.shape == start[name].shape and torch.equal(p.to(start[name]), start[name]))
    }


def _those_of(
    names: Sequence[str], states: Sequence[Mapping[str, Any]], params: Mapping[str, Tensor], moved: set[str], total: int
) -> list[str]:
    """Return the names of the states, in order: all, or the only choice with their shapes and all changed weights."""
    shapes = [next((tuple(v.shape) for v in s.values() if isinstance(v, Tensor) and v.dim() > 0), None) for s in states]

    def fits(name: str, shape: tuple[int, ...] | None) -> bool:
        return shape is None or shape == tuple(params[name].shape)

    if len(names) == len(states):
        for i, (name, state) in enumerate(zip(names, states, strict=True)):
            for part, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.shape != params[name].shape:
                    raise ValueError(
                        f"state {i} ({part} {tuple(value.shape)}) should be {name!r} {tuple(params[name].shape)} in "
                        "the order that Trainer saves; this state has another order and no names"
                    )
        return list(names)
    count, wanted = len(names), len(states)
    # ways[i][j]: the number of ways in which states j.. belong to names i..; 2 means more than one
    ways = [[0] * (wanted + 1) for _ in range(count + 1)]
    ways[count][wanted] = 1
    for i in range(count - 1, -1, -1):
        for j in range(wanted, -1, -1):
            left_out = 0 if names[i] in moved else ways[i + 1][j]
            taken = ways[i + 1][j + 1] if j < wanted and fits(names[i], shapes[j]) else 0
            ways[i][j] = min(2, left_out + taken)
    if ways[0][0] != 1:
        why = (
            "several choices of the model's have their shapes"
            if ways[0][0]
            else "no choice of the model's has their shapes"
            + (f" and the {len(moved)} weights that differ from --model" if moved else "")
        )
        narrow = any(p.dtype.itemsize < 4 for p in params.values())
        raise ValueError(
            f"it contains {total} parameters without names, of {len(params)} that may be trained, and {why}; save "
            "a state with names (Trainer with optimizer_cls_and_kwargs=optim.hf.resolve('adamw', args)), or freeze "
            "nothing; --model must be the model that training started from"
            + ("; small changes are visible only with --set model.dtype=float32" if narrow else "")
        )
    chosen, i = [], 0
    for j in range(wanted):
        while names[i] not in moved and ways[i + 1][j]:
            i += 1
        chosen.append(names[i])
        i += 1
    return chosen


def restrict(found: UpdateMap, names: Sequence[str], rule: UpdateRule | None = None) -> UpdateMap:
    """Return an update map for some parameters only.

    Args:
        found: The update map.
        names: The parameters.
        rule: Another rule with a new state (`SGDRule` gives the gradient); by default the rules of `found`.
    """
    params = {name: found.params[name] for name in names}
    if rule is not None:
        return UpdateMap(dict.fromkeys(names, rule), {name: rule.init(p) for name, p in params.items()}, params)
    return UpdateMap({n: found.rules[n] for n in names}, {n: found.states[n] for n in names}, params)


def epsilon_warning(found: UpdateMap) -> str | None:
    """Return a warning if LESS's published epsilon dominates the second moment: median sqrt(v) < 10 sqrt(1e-8).

    Args:
        found: The update map.

    Returns:
        The warning, or None.
    """
    moments = [state["exp_avg_sq"].flatten() for state in found.states.values() if "exp_avg_sq" in state]
    if not moments:
        return None
    median = float(torch.cat([m[:: max(1, m.numel() // 4096)] for m in moments]).median().sqrt())
    if median >= 10 * 1e-4:
        return None
    return (
        f"adam_mode=code: the median root of the second moment is {median:.1e}, small compared with epsilon; the "
        "feature is close to plain momentum (spec 4.1 of LESS's published code). Use adam_mode=paper to avoid this"
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters to which a checkpoint's optimizer state may belong.

    These are the parameters in an adapter's file, the LoRA matrices of new adapters, or every weight of a plain model.

    Args:
        model: The model.
    """
    return dict(saved_parameters(model) or lora_parameters(model) or model.named_parameters())
