"""The optimizers in `transformers.Trainer`, through its own argument; transformers itself is not imported.

    from optim import hf

    trainer = Trainer(model, args, optimizer_cls_and_kwargs=hf.resolve("lion", args), ...)
    hf.use_schedule(trainer, "wsd", decay_steps=200)  # optional: a schedule of this package

`TrainingArguments(optim=...)` accepts the names of its own list only, and `optimizers=` takes an optimizer that was
built before the model is wrapped, which breaks under FSDP.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optim import OPTIMIZERS, RULES, Optimizer, create, example_parameters, group_factors, schedule
from optim.curvature import CurvatureRule
from optim.registry import check_optimizer
from optim.schedules import schedule_options

Build: TypeAlias = Callable[..., Optimizer]
Factory: TypeAlias = Callable[[], Build]


def resolve(name: str, args: Any = None, *, decay_all: bool = False, **hyper: Any) -> tuple[Factory, dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes for the optimizer of that name.

    The optimizer is built from the names of the parameters that train, so that its checkpoints have names, selection
    can read it, and Muon, Adam-mini and block ratios can distinguish layers.

    Args:
        name: A key of `optim.OPTIMIZERS`.
        args: The `TrainingArguments`. Learning rate and weight decay are taken from them, and so are Adam's betas and
            epsilon where they were changed and the optimizer has them; what is given here takes precedence. Trainer
            passes none of them on by itself, so without `args` the learning rate must be given.
        decay_all: Whether norms and biases have weight decay as well; without it they have none, as with Trainer's own
            optimizers.
        **hyper: As for `optim.create`: `lr`, `weight_decay`, `block_ratios` and the keywords of the optimizer's class.

    Raises:
        ValueError: For an unknown name or values out of range, immediately and not when training starts.
        TypeError: For an unknown keyword or a missing learning rate, immediately.

    Warns:
        UserWarning: About arguments that were changed and are not used, and for rules that read curvature, which
            Trainer does not refresh.

    Example:
        >>> from optim import hf
        >>> factory, settings = hf.resolve("lion", lr=1e-4, betas=(0.95, 0.98))
        >>> settings
        {'lr': 0.0001, 'betas': (0.95, 0.98)}
    """
    check_optimizer(name)
    if args is not None:
        hyper = _from_arguments(name, args) | hyper
    if "lr" not in hyper:
        raise TypeError(
            "optim.hf.resolve: no learning rate; Trainer does not hand on its own, so pass the TrainingArguments "
            f"(resolve({name!r}, args)) or lr=..."
        )
    # by parts of names that the examples do not have
    named_later: dict[str, Any] = {key: {} for key in ("assign", "blocks") if isinstance(hyper.get(key), Mapping)}
    create(name, example_parameters(hyper.get("block_ratios")), **hyper | named_later)
    if issubclass(RULES[name], CurvatureRule):
        warnings.warn(
            f"optim.hf.resolve: Trainer does not refresh the curvature that {name} reads; without it {name} is hardly "
            "more than momentum. Call optim.curvature.refresh in a training_step of your own, or use `datatools train`",
            UserWarning,
            stacklevel=2,
        )
    # Trainer tells a factory from a class, calls it once without arguments and the result with the model and the rest
    return partial(_factory, name, decay_all), hyper


def use_schedule(trainer: Any, name: str, **options: Any) -> None:
    """Make a Trainer follow a schedule of this package instead of `args.lr_scheduler_type`; call it before `train()`.

    Of T steps the k-th has the factor at k of T + 1, as in `datatools train`: neither the first nor the last step is at
    rate 0. Groups with `block_ratios` follow their own blockwise curve.

    Args:
        trainer: The Trainer.
        name: A key of `optim.SCHEDULES`.
        **options: As for `optim.schedule`; `warmup_steps` are those of the arguments where the schedule has them and
            none are given here.

    Raises:
        ValueError: For an unknown name or values out of range, immediately.
        TypeError: For an option that the schedule does not have, immediately.
        RuntimeError: If the Trainer already has a schedule.

    Example:
        >>> from types import SimpleNamespace
        >>> from optim import hf
        >>> trainer = SimpleNamespace(lr_scheduler=None, args=SimpleNamespace(warmup_steps=0), create_scheduler=None)
        >>> hf.use_schedule(trainer, "wsd", decay_steps=200)  # here a stand-in for a transformers.Trainer
        >>> callable(trainer.create_scheduler)
        True
    """
    known = schedule_options(name)
    schedule(name, **{"total_steps": 1 << 30} | options)
    if trainer.lr_scheduler is not None:
        raise RuntimeError("optim.hf.use_schedule: the Trainer has made its schedule already; call it before train()")

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        if trainer.lr_scheduler is None:
            optimizer = trainer.optimizer if optimizer is None else optimizer
            warmup = {"warmup_steps": trainer.args.get_warmup_steps(num_training_steps)}
            settings = (warmup if "warmup_steps" in known else {}) | options
            factors = group_factors(optimizer, name, **{"total_steps": num_training_steps + 1} | settings)
            trainer.lr_scheduler = LambdaLR(optimizer, [partial(_next, factor) for factor in factors])
            trainer._created_lr_scheduler = True
        return cast(LambdaLR, trainer.lr_scheduler)

    trainer.create_scheduler = create_scheduler


def _next(factor: Callable[[int], float], step: int) -> float:
    return factor(step + 1)


def _factory(name: str, decay_all: bool) -> Build:
    return partial(_build, name=name, decay_all=decay_all)


def _build(model: nn.Module, *, name: str, decay_all: bool, **hyper: Any) -> Optimizer:
    return create(name, model, decay_all=decay_all, **hyper)


def _from_arguments(name: str, args: Any) -> dict[str, Any]:
    """The hyper-parameters that the `TrainingArguments` give to the optimizer of that name."""
    known = inspect.signature(OPTIMIZERS[name]).parameters
    found: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    # 0.9, 0.999 and 1e-8 are Trainer's defaults for AdamW: not something that was asked for of another rule
    betas = (args.adam_beta1, args.adam_beta2)
    for key, value, default, theirs in (
        ("betas", betas, (0.9, 0.999), "adam_beta1 and adam_beta2"),
        ("eps", args.adam_epsilon, 1e-8, "adam_epsilon"),
    ):
        if value != default and key in known:
            found[key] = value
        elif value != default:
            warnings.warn(f"optim.hf.resolve: {name} does not use {theirs} ({value})", UserWarning, stacklevel=3)
    if getattr(args, "optim_args", None):
        warnings.warn(
            f"optim.hf.resolve: optim_args={args.optim_args!r} is not used; give keywords to resolve instead",
            UserWarning,
            stacklevel=3,
        )
    return found
