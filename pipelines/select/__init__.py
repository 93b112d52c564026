"""Selection of training rows: the methods, the run, explanations, and the audit."""

from pipelines.former import front_door

__getattr__ = front_door(__name__, "run")
