"""Training orders: estimates, search, and validation.

`from pipelines import order; order(model, tokenizer, dataset, validation)` searches in memory: see `in_memory`.
"""

from pipelines.former import callable_as, front_door

__getattr__ = front_door(__name__, "run")
callable_as(__name__, "order", f"{__name__}.in_memory")
