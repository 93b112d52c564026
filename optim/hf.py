"""The optimizers of this package in `transformers.Trainer`, through its own argument. It does not import transformers.

    from optim import hf

    trainer = Trainer(model, args, optimizer_cls_and_kwargs=hf.resolve("lion", args), ...)
    hf.use_schedule(trainer, "wsd", decay_steps=200)  # optional: a schedule of this package

`TrainingArguments(optim=...)` only accepts the names in its own list, and `optimizers=` takes an optimizer that was
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
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes, for the optimizer of the given name.

    The optimizer is built from named parameters (those that are trained), so that its checkpoints contain names,
    selection can read it, and Muon, Adam-mini and block ratios can distinguish layers.

    Args:
        name: A key of `optim.OPTIMIZERS`.
        args: The `TrainingArguments`. The learning rate and weight decay are taken from them, and so are Adam's betas
            and epsilon if they were changed and the optimizer has them. Values in `hyper` take precedence. Trainer does
            not pass any of them on by itself, so without `args` the learning rate must be given.
        decay_all: Whether norms and biases have weight decay as well. By default they have none, as with Trainer's own
            optimizers.
        **hyper: As for `optim.create`: `lr`, `weight_decay`, `block_ratios` and the keywords of the optimizer's class.

    Returns:
        A factory of optimizers and their keyword arguments.

    Raises:
        ValueError: For an unknown name or values out of range. It is raised here and not only when training starts.
        TypeError: For an unknown keyword or a missing learning rate. It is raised here as well.

    Warns:
        UserWarning: About arguments that were changed but are not used, and for rules that read curvature, which
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
            "optim.hf.resolve: no learning rate; Trainer does not pass its own on, so give the TrainingArguments "
            f"(resolve({name!r}, args)) or lr=..."
        )
    # these refer to parts of names, which the example parameters do not have
    named_later: dict[str, Any] = {key: {} for key in ("assign", "blocks") if isinstance(hyper.get(key), Mapping)}
    create(name, example_parameters(hyper.get("block_ratios")), **hyper | named_later)
    if issubclass(RULES[name], CurvatureRule):
        warnings.warn(
            f"optim.hf.resolve: Trainer does not refresh the curvature that {name} reads; without it {name} is little "
            "more than momentum. Call optim.curvature.refresh in your own training_step, or use `datatools train`",
            UserWarning,
            stacklevel=2,
        )
    # Trainer distinguishes a factory from a class. It calls the factory without arguments, and its result with the
    # model and the keyword arguments
    return partial(_factory, name, decay_all), hyper


def use_schedule(trainer: Any, name: str, **options: Any) -> None:
    """Make a Trainer follow a schedule of this package instead of `args.lr_scheduler_type`; call it before `train()`.

    Step k of T has the factor of step k of a schedule over T + 1 steps, as in `datatools train`, so that neither the
    first nor the last step has a rate of 0. Groups with `block_ratios` follow their own blockwise curve.

    Args:
        trainer: The Trainer.
        name: A key of `optim.SCHEDULES`.
        **options: As for `optim.schedule`. If the schedule has `warmup_steps` and none are given here, they are taken
            from the TrainingArguments.

    Raises:
        ValueError: For an unknown name or values out of range.
        TypeError: For an option that the schedule does not have.
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
        raise RuntimeError("optim.hf.use_schedule: the Trainer already has a schedule; call this before train()")

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
    """Return the hyper-parameters that the `TrainingArguments` specify for the optimizer of that name."""
    known = inspect.signature(OPTIMIZERS[name]).parameters
    found: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    # 0.9, 0.999 and 1e-8 are Trainer's defaults for AdamW, so they are not a request for another rule
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
            f"optim.hf.resolve: optim_args={args.optim_args!r} is not used; pass keywords to resolve instead",
            UserWarning,
            stacklevel=3,
        )
    return found
