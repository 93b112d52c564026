"""Stated figures of hardware, and unit costs that were measured; each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.settings.plan import HardwareConfig


@dataclass(frozen=True)
class Kind:
    """One kind of worker.

    Attributes:
        tflops: The peak in 10^12 operations per second, dense.
        memory_gb: Its memory in GB.
        per_node: Workers on one machine.
        utilisation: The share of the peak that a pass of a language model reaches.
        source: Where the figures come from.
        weight_bytes: Bytes of one weight of the model.
    """

    tflops: float
    memory_gb: float
    per_node: int = 8
    utilisation: float = 0.35
    source: str = "data sheet, bfloat16 without sparsity; the share of the peak is an assumption"
    weight_bytes: int = 2


KINDS: dict[str, Kind] = {
    "h100": Kind(989, 80),
    "h200": Kind(989, 141),
    "b200": Kind(2250, 180),
    "a100-40": Kind(312, 40),
    "a100": Kind(312, 80),
    "l40s": Kind(362, 48),
    "v100": Kind(125, 32, source="data sheet, float16; the share of the peak is an assumption"),
    "mi300x": Kind(1307, 192),
    "cpu": Kind(
        0.097,
        8,
        per_node=64,
        utilisation=0.53,
        source="measured: float32 on one core of an AMD EPYC with AVX-512, SmolLM2 135M (benchmark extraction)",
        weight_bytes=4,
    ),
}

ROW_SECONDS, TOKEN_SECONDS = 8e-5, 4.2e-6
"""Seconds of one core per row and per token to read, check and encode rows: measured with SmolLM2's tokenizer on rows
of 65 and of 305 tokens (0.33 and 1.4 ms per row, November 2026, AMD EPYC)."""

TOKEN_BYTES = 5
"""Bytes of the row index per token: its id, and whether it is supervised. A row has about 100 bytes more."""

ROW_BYTES = 100

WRITE_SECONDS = 6e-6
"""Seconds per row of one process to select and to write the tables (measured on 5,000 and 20,000 rows)."""

TEXT_BYTES = 4.5
"""Bytes of input per token of English text."""

RANGE_BYTES = 4 << 20
"""Bytes of input that one worker indexes at a time."""

START_SECONDS = 15.0
"""Seconds until a process has loaded its libraries and found its settings."""

CORE_TFLOPS = 0.097
"""Peak of one core, for the products of stored features (see `cpu` above)."""

CORES_OF_LEADER = 8
"""Cores with which the process that leads a run multiplies stored features."""

FORWARD, BACKWARD, TRAIN = 2.0, 2.0, 4.0
"""Operations per parameter and token: of a forward pass, of the gradients of activations (weights are frozen under
LoRA), and of a step of training adapters."""


def resolved(config: HardwareConfig) -> Kind:
    """Return the figures to use: those that the settings give, otherwise those of the kind.

    Args:
        config: The settings.
    """
    kind = KINDS[config.name]
    return Kind(
        config.tflops or kind.tflops,
        config.memory_gb or kind.memory_gb,
        config.per_node or kind.per_node,
        config.utilisation or kind.utilisation,
        "given" if config.tflops and config.utilisation else kind.source,
        kind.weight_bytes,
    )
