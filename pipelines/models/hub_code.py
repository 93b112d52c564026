"""bitsandbytes, imported without code from the hub.

On CPUs with AVX512-BF16, bitsandbytes downloads and runs a kernel of a hub repository when it is imported and the
package `kernels` is installed. peft imports bitsandbytes, and transformers' trainer imports peft, so that no command
could keep its word that remote code is off. The kernel is not needed: it computes in a layout without gradients.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_PACKAGE, _FETCHES = "bitsandbytes", "kernels"


class Finder(MetaPathFinder):
    """An import finder for bitsandbytes, whose modules run without the package that fetches code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the specification of bitsandbytes as Python finds it; None for every other name.

        Args:
            fullname: The full name of the module.
            path: Where to look.
            target: Not used.
        """
        spec = PathFinder.find_spec(fullname, path) if fullname == _PACKAGE else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with _without_the_hub():
                run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def _without_the_hub() -> Iterator[None]:
    missing: Any = object()
    before, level = sys.modules.get(_FETCHES, missing), logging.root.manager.disable
    sys.modules[_FETCHES] = None  # type: ignore[assignment]  # importing it now fails
    logging.disable(logging.WARNING)  # it says that the code is missing
    try:
        yield
    finally:
        logging.disable(level)
        del sys.modules[_FETCHES]
        if before is not missing:
            sys.modules[_FETCHES] = before


def install() -> None:
    """Make every later import of bitsandbytes in this process one without code from the hub."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
