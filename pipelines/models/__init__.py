"""Models, adapters, tokenizers and saved states: they are opened here and checked when they are opened."""

from pipelines.former import front_door

__getattr__ = front_door(__name__, "load", "losses", "lora", "named")
