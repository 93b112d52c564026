"""Muon in float64 numpy by singular values: Newton-Schulz maps each s to a s + b s^3 + c s^5 and keeps the vectors."""

import numpy as np

TRIPLES = {
    "keller_jordan": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
    "polar_express_8": [
        (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
        (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
        (3.9486908534822946 / 1.01, -2.908902115962949 / 1.01**3, 0.5518191394370137 / 1.01**5),
        (3.3184196573706015 / 1.01, -2.488488024314874 / 1.01**3, 0.51004894012372 / 1.01**5),
        (2.300652019954817 / 1.01, -1.6689039845747493 / 1.01**3, 0.4188073119525673 / 1.01**5),
    ],  # the three others do not act in five steps
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "deepseek_v4": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
    "dion": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}


def orthogonalised(matrix, names="keller_jordan", steps=5, eps=1e-7, form="plain"):
    triples = TRIPLES[names] if isinstance(names, str) else list(names)
    safety = {"polar_express": 1.02, "polar_express_8": 1.01}.get(names, 1.0) if isinstance(names, str) else 1.0
    if 0 in matrix.shape:
        return matrix
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    norm = safety * np.sqrt((matrix**2).sum())
    s = s / (max(norm, eps) if form == "torch" else norm + eps)
    for k in range(steps):
        a, b, c = triples[min(k, len(triples) - 1)]
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def run(
    start,
    grads,
    *,
    lr,
    weight_decay,
    momentum=0.95,
    nesterov=True,
    momentum_form="heavy_ball",
    scale="match_rms_adamw",
    conv_scale="matrix",
    ns_steps=5,
    ns_coefficients="keller_jordan",
    ns_eps=1e-7,
    ns_form="plain",
    ns_dtype="param",
    cautious_decay=False,
):
    """Parameters after every gradient; a gradient that is None is no step."""
    assert ns_dtype == "param"
    theta = np.array(start, dtype=np.float64)
    buffer, path = np.zeros_like(theta), []
    rows, cols = theta.shape[0], int(np.prod(theta.shape[1:]))
    m, n = theta.shape[-2:] if conv_scale == "kernel" else (rows, cols)
    factor = {
        "match_rms_adamw": 0.2 * np.sqrt(max(m, n)),
        "original": np.sqrt(max(1.0, m / n)),
        "spectral_norm": np.sqrt(m / n),
        "none": 1.0,
    }[scale]
    for g in grads:
        if g is not None:
            share = 1 - momentum if momentum_form == "ema" else 1.0
            buffer = momentum * buffer + share * g
            d = momentum * buffer + share * g if nesterov else buffer
            step = factor * orthogonalised(d.reshape(rows, cols), ns_coefficients, ns_steps, ns_eps, ns_form)
            step = step.reshape(theta.shape)
            pulled = np.where(step * theta >= 0, theta, 0) if cautious_decay else theta
            theta = theta - lr * (step + weight_decay * pulled)
        path.append(theta.copy())
    return path
