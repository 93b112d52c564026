"""Former names of modules, from before they moved into rooms. Scripts may still import them.

A former module finds its names in the modules that define them today. New code imports those modules.
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
"""Former module -> the modules of `pipelines` that define its names today."""


class Finder(MetaPathFinder, Loader):
    """An import finder for the former modules; it runs after all finders of real modules."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """Return the specification of a former module; None for every other name.

        Args:
            fullname: The full name of the module.
            path: Not used.
            target: Not used.
        """
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "pipelines" and name in FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        """Make the names of a former module available; each is looked up when it is used.

        Args:
            module: The module.
        """
        places = FORMER[module.__name__.rpartition(".")[2]]
        module.__getattr__ = _look_up(module.__name__, *(f"pipelines.{place}" for place in places))  # type: ignore[method-assign]


def front_door(room: str, *places: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a room, which finds its modules and the names that its former module had.

    Args:
        room: The full name of the room.
        *places: The modules of the room that define the names.
    """
    look_up = _look_up(room, *(f"{room}.{place}" for place in places))

    def found(name: str) -> Any:
        if not name.startswith("__") and find_spec(f"{room}.{name}") is not None:
            return import_module(f"{room}.{name}")
        return look_up(name)

    return found


def _look_up(module: str, *places: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names are defined in the modules `places`."""

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
    """Let a module be called like its function: `pipelines.select.run(config)`, `pipelines.models.load(config)`.

    Args:
        module: The full name of the module.
        function: The name of the function.
        place: The module that defines the function; by default the module itself.
    """

    class Called(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(import_module(place) if place else self, function)(*args, **options)

    sys.modules[module].__class__ = Called
