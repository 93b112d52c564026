"""Optimizers as functions: rules, the one `Optimizer` that runs them, and the map from gradients to updates.

    optimizer = create("adamw", model.named_parameters(), lr=3e-4, betas=(0.9, 0.95))
    directions = UpdateMap.of(optimizer).per_sample(grads)  # name -> [batch, *shape]; no state is changed

The package imports torch and neither of the other packages. It loads torch when a name that needs it is first used,
so that modules without torch (`optim.unknown`) load quickly. README.md has the table of optimizers.
"""

from importlib import import_module
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optim.api import *
else:

    def __getattr__(name):
        """Return a module of the package, or a public name of `optim.api`."""
        if name.startswith("__"):
            raise AttributeError(f"module 'optim' has no attribute {name!r}")
        if PathFinder.find_spec(f"optim.{name}", __path__) is not None:  # noqa: F405
            return import_module(f"optim.{name}")
        try:
            found = getattr(import_module("optim.api"), name)
        except AttributeError:
            raise AttributeError(f"module 'optim' has no attribute {name!r}") from None
        globals()[name] = found
        return found

    def __dir__():
        return sorted({*globals(), *vars(import_module("optim.api"))})
