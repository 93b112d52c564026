"""Diagnoses of a training setup."""

from pipelines.former import front_door

__getattr__ = front_door(__name__, "run")
