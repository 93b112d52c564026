"""Selection of training rows: the methods, the run, explanations, and the audit.

`from pipelines import select; select(model, tokenizer, dataset, target)` selects in memory; see `in_memory`.
"""

from pipelines.former import callable_as, front_door

__getattr__ = front_door(__name__, "run")
callable_as(__name__, "select", f"{__name__}.in_memory")
