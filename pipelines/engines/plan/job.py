"""The job that a plan is made for, and its stages: from figures of the hardware, or from a measured run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.engines.plan import hardware
from pipelines.engines.plan.hardware import Kind
from pipelines.engines.plan.pilot import Pilot
from pipelines.engines.plan.simulation import Stage
from pipelines.settings.methods import Method
from pipelines.settings.plan import HardwareConfig, PlanConfig

BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "int8": 8, "int4": 4, "int1": 1}
EPOCHS = 4
GB = 1e9


@dataclass(frozen=True)
class Job:
    """What has to be computed.

    Attributes:
        rows: Rows of the pool.
        tokens: Tokens of a row.
        targets: Rows of the target.
        parameters: Parameters of the model; 0 if the method uses none.
        method: The record of the method.
        width: Bytes of a stored feature.
        numbers: Numbers of a stored feature.
        passes: Passes over the pool, gradients or forward.
        warmup: The share of the pool that the warm-up trains on, times its epochs.
        unit: Rows of a unit.
        workers: The workers.
        kind: What each of them computes with.
        disks: The rates of disks and network.
        pilot: The measured costs; None to use the figures.
    """

    rows: float
    tokens: float
    targets: int
    parameters: float
    method: Method
    width: float
    numbers: float
    passes: float
    warmup: float
    unit: int
    workers: int
    kind: Kind
    disks: HardwareConfig
    pilot: Pilot | None

    @property
    def gradients(self) -> bool:
        """Whether gradients are computed, rather than forward passes alone."""
        return "gradients" in self.method.needs

    @property
    def nodes(self) -> int:
        """The number of machines."""
        return -(-self.workers // self.kind.per_node)

    @property
    def units(self) -> int:
        """The number of units of one pass."""
        return math.ceil(self.rows / self.unit)

    @property
    def flops(self) -> dict[str, float]:
        """Operations by stage."""
        each = self.rows * self.tokens * self.parameters
        features = hardware.FORWARD + (hardware.BACKWARD if self.gradients else 0.0)
        found = {"warm-up": self.warmup * hardware.TRAIN * each, "features": self.passes * features * each}
        return {**found, "scores": 2.0 * self.rows * self.numbers * self.targets * self.passes}

    @property
    def disk(self) -> dict[str, float]:
        """Bytes on disk, by what they hold."""
        return {
            "row index": self.rows * (hardware.ROW_BYTES + hardware.TOKEN_BYTES * self.tokens),
            "features": self.rows * self.passes * self.width,
        }

    @property
    def weights(self) -> float:
        """Bytes of the model's weights: 16 bits each on a GPU, 32 on a CPU."""
        return self.parameters * self.kind.weight_bytes

    @property
    def memory(self) -> float:
        """Bytes that one worker needs: weights, and what 1,024 tokens keep for a backward pass."""
        layers = (self.parameters / (12 * 128**2)) ** (1 / 3)  # a model about 128 times as wide as it is deep
        kept = 34 * 128 * layers**2 * 1024 if self.gradients else 0.0
        return self.weights + kept

    @property
    def host_memory(self) -> float:
        """Bytes of main memory of one machine: the columns of the pool, in each of its processes."""
        return self.rows * hardware.ROW_BYTES * min(self.workers, self.kind.per_node)

    @property
    def network(self) -> float:
        """Bytes between the machines and the shared folder."""
        columns = self.rows * hardware.ROW_BYTES * self.workers
        return sum(self.disk.values()) + self.disk["features"] + columns + self.weights * self.nodes

    def stages(self) -> list[Stage]:
        """Return the stages of the run, in order."""
        pilot, disks, workers = self.pilot, self.disks, self.workers
        read, write = (GB * min(rate, self.nodes * disks.network) for rate in (disks.disk_read, disks.disk_write))
        speed = self.kind.tflops * 1e12 * self.kind.utilisation
        flops = self.flops
        text = self.rows * (pilot.bytes_per_row if pilot else self.tokens * hardware.TEXT_BYTES)
        ranges = math.ceil(text / hardware.RANGE_BYTES)
        row = pilot.read if pilot else hardware.ROW_SECONDS + hardware.TOKEN_SECONDS * self.tokens
        found = [
            Stage(
                "start", workers, pilot.start if pilot else hardware.START_SECONDS,
                self.weights / min(workers, self.kind.per_node), read, bound="loading libraries and weights",
            ),
            Stage(
                "index", ranges, row * self.rows / ranges, self.disk["row index"] / ranges, write,
                bound="one core of each worker",
            ),
        ]  # fmt: skip
        if workers > 1:
            found.append(Stage("columns", workers, 0.0, self.rows * hardware.ROW_BYTES, read, bound="reading"))
        if self.gradients and self.warmup:
            seconds = pilot.warmup * self.rows * self.tokens * self.warmup if pilot else flops["warm-up"] / speed
            found.append(Stage("warm-up", EPOCHS, seconds / EPOCHS, alone=True))
        if self.passes:
            seconds = (
                self.unit * self.tokens * pilot.features
                if pilot
                else flops["features"] / speed / self.passes / self.units
            )
            whole, part = divmod(self.passes, 1)
            counts = [self.units] * int(whole) + ([math.ceil(self.units * part)] if part else [])
            found += [Stage("features", count, seconds, self.unit * self.width, write) for count in counts]
            cpu = hardware.CORES_OF_LEADER * hardware.CORE_TFLOPS * 1e12 * hardware.KINDS["cpu"].utilisation
            score = pilot.scores * self.rows if pilot else flops["scores"] / cpu
            read_alone = GB * min(disks.disk_read, disks.network)
            found.append(Stage("scores", 64, score / 64, self.disk["features"] / 64, read_alone, alone=True))
        writing = (pilot.write if pilot else hardware.WRITE_SECONDS) * self.rows
        found.append(Stage("select and write", 1, writing, alone=True))
        return found


def job_of(config: PlanConfig, method: Method, parameters: float, pilot: Pilot | None) -> Job:
    """Return the job that the settings describe.

    Args:
        config: The settings.
        method: The record of the method.
        parameters: The number of parameters of the model.
        pilot: A measured run, whose settings stand where `config` has none.
    """
    uses = "model" in method.needs
    gradients = "gradients" in method.needs
    layers = (parameters / (12 * 128**2)) ** (1 / 3)
    dim = config.dim or (pilot.dim if pilot else 8192)
    if gradients:
        default = EPOCHS if method.checkpoints == "all" else 1
        passes = float(config.checkpoints or (pilot.passes if pilot else 0) or method.passes or default)
        numbers, width = float(dim), dim * BITS[config.dtype or (pilot.dtype if pilot else "float16")] / 8 + 8
    else:
        passes = float(method.forward.count("pool")) if uses else 0.0
        states = method.kind == "similarity"  # of hidden states; other methods keep losses
        numbers = pilot.numbers if pilot and pilot.numbers else round(128 * layers) if states else 1
        width = 2.0 * numbers if states else 8.0
    share = config.warmup if config.warmup is not None else pilot.share if pilot else 0.05
    epochs = pilot.epochs if pilot else EPOCHS
    unit = max(16, min(math.ceil(config.rows / 64), (32 << 20) // int(4 * numbers)))  # as a store chooses it
    return Job(
        rows=config.rows,
        tokens=config.tokens_per_row or (pilot.tokens if pilot else 350.0),
        targets=config.targets,
        parameters=parameters if uses else 0.0,
        method=method,
        width=width,
        numbers=float(numbers),
        passes=passes,
        warmup=share * epochs if gradients else 0.0,
        unit=config.rows_per_unit or (pilot.unit if pilot else 0) or unit,
        workers=config.gpus,
        kind=hardware.resolved(config.hardware),
        disks=config.hardware,
        pilot=pilot,
    )  # fmt: skip
