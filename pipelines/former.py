"""Names of modules before they moved into rooms, which scripts may still import.

A former module finds its names in the modules that hold them today. New code imports those.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

FORMER: dict[str, tuple[str, ...]] = {
    "config": tuple(
        f"settings.{name}" for name in ("base", "parts", "select", "train", "order", "audit", "diagnose", "demo")
    ),
    "data": ("rows.row", "rows.read", "rows.index"),
    "encode": ("rows.encode", "rows.encoded"),
    "chat": ("rows.chat.refusals", "rows.chat.render", "rows.chat.template", "rows.chat"),
    "coresets": ("colm", "colm.mixin", "colm.coresets", "colm.sources"),
    "evaluation": ("training.evaluation",),
    "train": ("training.train",),
    "trainer": ("training.trainer",),
    "audit": ("select.audit",),
    "explain": ("select.explain",),
    "adapters": ("models.adapters",),
    "checkpoints": ("training.checkpoints",),
}
"""Former module -> the modules of `pipelines` that have its names today."""


class Finder(MetaPathFinder, Loader):
    """Finds the former modules, after all finders of real ones."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The specification of a former module; None for every other name."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "pipelines" and name in FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        """Make each name of the module one that is looked up when it is used."""
        places = FORMER[module.__name__.rpartition(".")[2]]
        module.__getattr__ = _look_up(module.__name__, *(f"pipelines.{place}" for place in places))  # type: ignore[method-assign]


def front_door(room: str, *places: str) -> Callable[[str], Any]:
    """`__getattr__` of a room: its modules, and the names that its former module had."""
    look_up = _look_up(room, *(f"{room}.{place}" for place in places))

    def found(name: str) -> Any:
        if not name.startswith("__") and find_spec(f"{room}.{name}") is not None:
            return import_module(f"{room}.{name}")
        return look_up(name)

    return found


def _look_up(module: str, *places: str) -> Callable[[str], Any]:
    """`__getattr__` of a module whose names stand in the modules `places`."""

    def found(name: str) -> Any:
        for place in places if not name.startswith("__") else ():
            holder = import_module(place)
            if hasattr(holder, name):
                return getattr(holder, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return found


def install() -> None:
    """Make the former modules importable."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())


def callable_as(module: str, function: str, place: str | None = None) -> None:
    """Let a module be called as a function: `pipelines.select.run(config)`, `pipelines.models.load(config)`.

    Args:
        module: The module, or the room: `from pipelines import select; select(model, tokenizer, dataset, target)`.
        function: The name of the function.
        place: The module that has it, imported when it is called; by default `module` itself.
    """

    class Called(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(import_module(place) if place else self, function)(*args, **options)

    sys.modules[module].__class__ = Called
