"""Smoothness: the Hessian in the norm that suits Adam, compared with the norm that suits gradient descent."""

from __future__ import annotations

from typing import Any

from optim import diagnostics
from pipelines.diagnose.looks import Check, Look, gradients
from pipelines.runs.progress import progress
from pipelines.runs.seeds import derive_seed
from pipelines.settings.diagnose import DiagnoseConfig

BASIS_BYTES = 2**30  # Lanczos keeps its vectors up to this size, and only the last two beyond
FROBENIUS_PROBES = 3


def products(config: DiagnoseConfig) -> int:
    """Return the number of Hessian-vector products of the check.

    Args:
        config: The settings.
    """
    return config.probes * (2 if config.rotate else 1) + config.lanczos_steps + FROBENIUS_PROBES


def smoothness(look: Look, seed: int) -> dict[str, Any]:
    """Return |H|_{1,1} / d from Cauchy probes, in the model's and in rotated coordinates, with lambda_max and |H|_F.

    Args:
        look: The model and the rows.
        seed: The seed of the probes and the rotation.
    """
    model, config = look.model, look.config
    grads = gradients(model, look.parts)
    named = [(name, p) for name, p in model.named_parameters() if name in grads]
    params = [p for _, p in named]
    start = [grads.pop(name) for name, _ in named]
    size = sum(p.numel() for p in params)
    whole = config.lanczos_steps * size * 4 <= BASIS_BYTES
    product = diagnostics.hessian(list(look.parts), params)
    settings: dict[str, Any] = {"probes": config.probes, "coordinates": config.coordinates, "seed": seed}
    with progress("Hessian", products(config), "products") as bar:
        found: dict[str, Any] = {"plain": diagnostics.linf_smoothness(product, params, **settings, advance=bar.advance)}
        if config.rotate:
            turn = diagnostics.Rotation(derive_seed(seed, "rotation"))
            found["rotated"] = diagnostics.linf_smoothness(
                product, params, **settings, rotation=turn, advance=bar.advance
            )
        found["lanczos"] = diagnostics.lanczos(
            product, start, steps=config.lanczos_steps, reorthogonalize=whole, advance=bar.advance
        ) | {"reorthogonalized": whole}
        found["frobenius"] = diagnostics.frobenius(
            product, params, probes=FROBENIUS_PROBES, seed=seed, advance=bar.advance
        )
    return found


CHECK = Check(
    title="the sum of the Hessian's entries, in the model's and in rotated coordinates, compared with its eigenvalues",
    cost="Hessian-vector products, three passes each; the most expensive check",
    measure=smoothness,
    passes=lambda config: 1 + 3 * products(config),
    keeps=lambda config, parameters: min(BASIS_BYTES, 4 * parameters * config.lanczos_steps),
    source="arXiv 2410.08198",
)
