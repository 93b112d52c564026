"""SOAP in float64 numpy, from arXiv 2409.11321, algorithm 3, and its code; and with a basis of every step."""

import numpy as np


def sorted_qr(factor, q):
    """A step of power iteration; columns by their eigenvalues, which come second."""
    q = np.linalg.qr(factor @ q)[0]
    values = np.diag(q.T @ factor @ q)
    order = np.argsort(-values, kind="stable")
    return q[:, order], values[order]


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    betas=(0.95, 0.95),
    eps=1e-8,
    shampoo_beta=None,
    variant="soap",
    precondition_frequency=10,
    max_precond_dim=10000,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    theta = np.array(start, dtype=np.float64)
    w = theta.reshape(len(theta), -1)
    m, v = np.zeros_like(w), np.zeros_like(w)
    beta = betas[1] if shampoo_beta is None else shampoo_beta
    q = [np.eye(size) for size in w.shape]
    factor = [np.zeros((size, size)) for size in w.shape]
    values = [np.zeros(size) for size in w.shape]
    sided = [size <= max_precond_dim or variant != "soap" for size in w.shape]
    t, path = 0, []

    def into(x):
        return q[0].T @ x @ q[1]

    def out(x):
        return q[0] @ x @ q[1].T

    def measure(g, beta):
        new = []
        for side, x in ((0, g), (1, g.T)):
            other = 1 - side
            if variant == "kl":
                inverse = q[other] / np.maximum(values[other], eps) @ q[other].T / x.shape[1]
                new.append(beta * factor[side] + (1 - beta) * x @ inverse @ x.T)
            else:
                new.append(beta * factor[side] + (1 - beta) * x @ x.T)
        factor[:] = new

    def decompose():
        for side in (0, 1):
            if sided[side]:
                found, vectors = np.linalg.eigh(factor[side])
                q[side], values[side] = vectors[:, ::-1], found[::-1]

    for grad in grads:
        if grad is not None:
            g = grad.reshape(w.shape)
            t += 1
            if variant == "soap" and t == 1:
                measure(g, beta)
                decompose()
            elif variant == "soap":
                n = into(g)
                m = betas[0] * m + (1 - betas[0]) * n
                v = betas[1] * v + (1 - betas[1]) * n**2
                c = (1 - betas[1] ** (t - 1)) ** 0.5 / (1 - betas[0] ** (t - 1))
                w = w - lr * (c * out(m / (np.sqrt(v) + eps)) + weight_decay * w)
                measure(g, beta)
                if (t - 1) % precondition_frequency == 0:
                    m = out(m)
                    for side in (0, 1):
                        if sided[side]:
                            order = np.argsort(-np.diag(q[side].T @ factor[side] @ q[side]), kind="stable")
                            v = np.take(v, order, axis=side)
                            q[side] = np.linalg.qr(factor[side] @ q[side][:, order])[0]
                    m = into(m)
            else:
                measure(g, 1 - (1 - beta) / (1 - beta**t))
                m = out(m)
                if t == 1:
                    decompose()
                else:
                    for side in (0, 1):
                        q[side], values[side] = sorted_qr(factor[side], q[side])
                m, n = into(m), into(g)
                m = betas[0] * m + (1 - betas[0]) * n
                v = betas[1] * v + (1 - betas[1]) * n**2
                u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
                w = w - lr * (out(u) + weight_decay * w)
        path.append(w.reshape(theta.shape).copy())
    return path
