"""CoLM in the training loop: each step trains on the rows of a large batch that represent all of it.

Use `from pipelines.colm import coreset` to keep rows of a data set in memory, and `CoresetMixin` for any
`transformers.Trainer`; `CoresetConfig` has its settings. Names are imported at first use, because importing the Trainer
takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.colm.in_memory import coreset as coreset
    from pipelines.colm.mixin import CoresetMixin as CoresetMixin
    from pipelines.settings.train import CoresetConfig as CoresetConfig

_EXPORTS = {
    "coreset": "pipelines.colm.in_memory",
    "CoresetMixin": "pipelines.colm.mixin",
    "CoresetConfig": "pipelines.settings.train",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pipelines.colm' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
