"""SGD in float64 numpy, written from the formulas of torch's documentation, with decoupled weight decay."""

import numpy as np


def run(start, grads, *, lr, weight_decay, momentum=0.0, dampening=0.0, nesterov=False):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    velocity, path = None, []
    for g in grads:
        if g is not None:
            step = g
            if momentum:
                velocity = np.array(g) if velocity is None else momentum * velocity + (1 - dampening) * g
                step = g + momentum * velocity if nesterov else velocity
            theta = (1 - lr * weight_decay) * theta - lr * step
        path.append(theta.copy())
    return path
