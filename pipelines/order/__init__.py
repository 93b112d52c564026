"""Training orders: estimates, search, and validation."""

from pipelines.former import front_door

__getattr__ = front_door(__name__, "run")
