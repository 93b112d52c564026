"""Checkpoints of a warm-up run, ours or the user's: the adapter, the optimizer's state by parameter name, its
learning rate.

Trainer's own `optimizer.pt` has no names: its integers count the decayed parameters first, then the others. The names
are put back in that order and every shape is checked; nothing is ever unpickled (`weights_only`), `training_args.bin`
never read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from datatools import DataError, UsageError, files
from optim import AdamWRule, UpdateMap, UpdateRule
from pipelines import models, trainer

_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")  # transformers 5, Trainer
_STATES = ("optimizer.pt", "optimizer.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its folder and step, the mean learning rate since the one before, and its weight in the score."""

    folder: Path
    step: int
    mean_lr: float
    weight: float

    @property
    def is_adapter(self) -> bool:
        """Whether it holds LoRA matrices rather than a whole model."""
        return (self.folder / "adapter_config.json").is_file()

    def digests(self) -> dict[str, str]:
        """File name -> hash of the weights and the optimizer state."""
        paths = [*sorted(self.folder.glob("*.safetensors")), *(self.folder / name for name in _STATES)]
        found = {path.name: files.digest_file(path) for path in paths if path.is_file()}
        if self.is_adapter:  # what of peft's file makes a difference; it also lists names in no fixed order
            config = files.read_json(self.folder / "adapter_config.json")
            found["adapter_config"] = ", ".join(f"{key}={config.get(key)}" for key in ("r", "lora_alpha", "use_rslora"))
        return found


def find(paths: Sequence[Path]) -> list[Checkpoint]:
    """The checkpoints in `paths` (checkpoint folders, or folders of runs, ours or Trainer's, that hold some), by step.

    The weight of a checkpoint is the mean learning rate of the optimizer steps since the one before (`log_history` of
    `trainer_state.json`), divided by the sum over checkpoints.
    Raises: UsageError when there is none; DataError for a folder without optimizer state or logged learning rates, or
    damaged since it was saved.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"--checkpoints {path}: no such folder")
        folders += _inside(path) or _inside(path / "checkpoints") or _inside(path / "warmup") or [path]
    for folder in folders:
        if (folder / trainer.COMPLETE).is_file() and not trainer.is_complete(folder):
            raise DataError(
                f"checkpoint {folder}: a file is not what {trainer.COMPLETE} says was saved; train again from the "
                "checkpoint before, or leave this one out"
            )
    states = {folder: _trainer_state(folder) for folder in folders}
    ordered = sorted(set(folders), key=lambda folder: int(states[folder]["global_step"]))
    found: list[tuple[Path, int, float]] = []
    before = 0
    for folder in ordered:
        step = int(states[folder]["global_step"])
        rates = [
            float(entry["learning_rate"])
            for entry in states[folder].get("log_history", [])
            if "learning_rate" in entry and before < int(entry["step"]) <= step
        ]
        if not rates or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise DataError(
                f"checkpoint {folder}: trainer_state.json logs no learning rate for steps {before + 1} to {step}; "
                "train with logging_steps=1, or give checkpoints further apart"
            )
        found.append((folder, step, sum(rates) / len(rates)))
        before = step
    total = sum(rate for _, _, rate in found)
    if total == 0:
        raise DataError(f"checkpoints {[str(f) for f in ordered]}: every logged learning rate is 0")
    return [Checkpoint(folder, step, rate, rate / total) for folder, step, rate in found]


def _inside(path: Path) -> list[Path]:
    """The checkpoints of a run's folder; without those of ours that a kill left half-saved."""
    found = [p for p in path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    ours = [p for p in found if (p / trainer.COMPLETE).is_file()]
    return ours or found


def _trainer_state(folder: Path) -> dict[str, Any]:
    if not any((folder / name).is_file() for name in _STATES):
        raise DataError(
            f"checkpoint {folder}: holds no optimizer.pt; LESS needs the optimizer's moments "
            "(train with save_only_model off)"
        )
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise DataError(f"checkpoint {folder}: trainer_state.json is missing, so its learning rate is not known")
    state = files.read_json(path)
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise DataError(f"{path}: not a Trainer's state: `global_step` is missing")
    return state


def updates(
    checkpoint: Checkpoint, params: Mapping[str, Tensor], *, adam_mode: str = "paper", module: nn.Module | None = None
) -> UpdateMap:
    """The optimizer at `checkpoint` as a map from gradients to updates, for the trainable parameters `params`.

    module: the model they are of; needed where a state has no names and its model has `nn.LayerNorm` layers, which
    Trainer tells by their type.
    adam_mode: "paper" is the optimizer's own rule; "code" LESS's published one (eps 1e-8 inside the root, no bias
    correction, betas 0.9 and 0.999); "precond_only" g / (sqrt(v^) + eps). The last two need AdamW's state.
    Raises: DataError when the state is not readable without unpickling, or does not fit the parameters by name and
    shape.
    """
    path = next(checkpoint.folder / name for name in _STATES if (checkpoint.folder / name).is_file())
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not readable as plain tensors, and nothing else is loaded: {first}") from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= set(saved):
        raise DataError(f"{path}: not an optimizer's state_dict: expected `state` and `param_groups`")
    try:
        named = _with_names(saved, params, module)
        found = UpdateMap.from_state_dict(named, params)
        rules = {name: _in_mode(rule, adam_mode) for name, rule in found.rules.items()}
        if rules != dict(found.rules):
            found = UpdateMap.from_state_dict(named, params, rules=rules)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: does not fit the model: {error}") from error
    return found


def _in_mode(rule: UpdateRule, mode: str) -> UpdateRule:
    if mode == "paper":
        return rule
    if not isinstance(rule, AdamWRule):
        raise ValueError(f"features.adam_mode={mode!r} is about AdamW, and this state is of {rule.name!r}; use 'paper'")
    if mode == "code":
        return AdamWRule(eps=0.0, eps_root=1e-8, bias_correction=False)
    if mode == "precond_only":
        return dataclasses.replace(rule, betas=(0.0, rule.betas[1]))
    raise ValueError(f"features.adam_mode={mode!r}; choose paper, code or precond_only")


def _with_names(
    saved: Mapping[str, Any], params: Mapping[str, Tensor], module: nn.Module | None = None
) -> Mapping[str, Any]:
    """`saved` with `param_names` in its groups, put back in Trainer's order where an integer-keyed state has none."""
    groups = saved["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if any("param_names" in group for group in groups) or not all(isinstance(key, int) for key in keys):
        return saved
    order = list(params)
    if len(groups) > 1:
        norms = {
            f"{name}.{own}"
            for name, layer in (module.named_modules() if module is not None else ())
            if isinstance(layer, nn.LayerNorm)
            for own in dict(layer.named_parameters())
        }
        undecayed = [n for n in params if n in norms or _UNDECAYED.search(n.lower())]
        order = [n for n in params if n not in set(undecayed)] + undecayed
    if len(keys) != len(order):
        raise ValueError(f"it holds {len(keys)} parameters without names, and the model trains {len(order)}")
    for key, name in zip(keys, order, strict=True):
        for part, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != params[name].shape:
                raise ValueError(
                    f"state {key} ({part} {tuple(value.shape)}) should be {name!r} {tuple(params[name].shape)} in "
                    "the order that Trainer saves; this state was saved in another, and has no names to tell"
                )
    names = iter(order)
    named = [{**group, "param_names": [next(names) for _ in group["params"]]} for group in groups]
    return {"state": saved["state"], "param_groups": named}


def restrict(found: UpdateMap, names: Sequence[str], rule: UpdateRule | None = None) -> UpdateMap:
    """`found` for the parameters `names` alone; with `rule`, that rule and a fresh state (`SGDRule`: the gradient)."""
    params = {name: found.params[name] for name in names}
    if rule is not None:
        return UpdateMap(dict.fromkeys(names, rule), {name: rule.init(p) for name, p in params.items()}, params)
    return UpdateMap({n: found.rules[n] for n in names}, {n: found.states[n] for n in names}, params)


def epsilon_warning(found: UpdateMap) -> str | None:
    """A warning when LESS's published epsilon drowns the second moment: median sqrt(v) < 10 sqrt(1e-8)."""
    moments = [state["exp_avg_sq"].flatten() for state in found.states.values() if "exp_avg_sq" in state]
    if not moments:
        return None
    median = float(torch.cat([m[:: max(1, m.numel() // 4096)] for m in moments]).median().sqrt())
    if median >= 10 * 1e-4:
        return None
    return (
        f"adam_mode=code: the median root of the second moment is {median:.1e}, below its epsilon's 1e-4; the "
        "feature is close to plain momentum (spec 4.1 of LESS's published code). adam_mode=paper does not have this"
    )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a checkpoint's optimizer state speaks of: LoRA matrices, or every weight of a plain model."""
    return dict(models.lora_parameters(model) or model.named_parameters())
