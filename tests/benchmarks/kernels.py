"""What each Triton kernel should cost on an H100, and what it compiles to: `python -m tests.benchmarks.kernels`.

No GPU is needed. Every kernel is launched by its own public function, with the launch caught and compiled ahead of
time for sm_80 and sm_90, with just the types, alignments and settings that it had. The predicted time is the largest of
(what is counted) / (what the machine does a second), over memory, tensor cores, integer units, table look-ups and
atomic additions. It is a bound to measure against, not a measurement.

    python -m tests.benchmarks.kernels            # the table, and tests/benchmarks/results/kernels.json
    python -m tests.benchmarks.kernels --readme   # and the table of optim/kernels/README.md
    python -m tests.benchmarks.kernels --json     # the compiled kernels as JSON, nothing written

`python -m pytest tests/benchmarks/test_kernels.py -m "bench and gpu" -s` measures them where there is a GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datatools.kernels import sjlt
from optim import backend
from optim.kernels import adamw, adamw_8bit, perturb, symmetric, unit_rms

README = Path(__file__).resolve().parents[2] / "optim" / "kernels" / "README.md"
TARGETS = (80, 90)
MARKS = ("<!-- made by python -m tests.benchmarks.kernels --readme -->", "<!-- end -->")

CLOCK, PROCESSORS = 1.83e9, 132
"""The clock at which 132 x 4096 fused multiply-adds a cycle make the data sheet's 989e12 FLOP/s (H100 SXM, bf16)."""

RATES = {
    "memory": 3.35e12,  # bytes; data sheet
    "tensor cores": 989e12,  # bf16 FLOP; data sheet
    "integers": PROCESSORS * 64 * CLOCK,  # 32-bit operations, 64 a processor and cycle
    "look-ups": PROCESSORS * 32 / 3.5 * CLOCK,  # 4-byte reads of a small table: 32 random ones take 3.5 cycles (banks)
    "atomics": 96 * CLOCK,  # additions at random places in L2: one for each of 96 slices and cycle; our assumption
}
"""What an H100 does a second."""

PARAMETERS = 134_515_008
"""Of SmolLM2-135M."""

PHILOX = 60 / 4
"""Integer operations for the random words of one element: 10 rounds of 2 wide products (2 each) and 2 xors, of 4."""


@dataclass(frozen=True)
class Work:
    """A kernel at a size people use: what it does there, and how it is launched (a smaller launch compiles alike)."""

    name: str
    size: str
    counts: dict[str, float]
    launch: Callable[[], object]
    file: str
    vector_loads: bool = False
    tensor_cores: bool = False


@dataclass
class Compiled:
    """One kernel for one target. stack: bytes a thread, where spills would be."""

    kernel: str
    registers: int
    shared: int
    stack: int
    warps: int
    ptx: str = field(repr=False)


def _moments(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype), torch.zeros(n), torch.zeros(n)


def _adamw(dtype: torch.dtype, **kwargs: Any) -> None:
    adamw.adamw_step(
        [_moments(1 << 14, dtype)],
        [adamw.Scalars(1.0, 1.0, 1)],
        lr=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        **kwargs,
    )


def _adamw_8bit(dtype: torch.dtype, **kwargs: Any) -> None:
    n = 1 << 14
    p, g, _, _ = _moments(n, dtype)
    codes, scales = torch.zeros(n, dtype=torch.uint8), torch.zeros(n // 256)
    book = torch.linspace(-1, 1, 256)
    adamw_8bit.adamw_8bit_step(
        [(p, g, codes, scales, codes.clone(), scales.clone())],
        [adamw.Scalars(1.0, 1.0, 1)],
        books=(book, book),
        block_size=256,
        lr=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        **kwargs,
    )


def _newton_schulz(n: int, p: int, q: int) -> dict[str, float]:
    """Five steps: both products on half the tiles, the third whole; spec 0.2, with the diagonal tiles in full."""
    tiles = -(-p // 128)
    half = (tiles + 1) / (2 * tiles)
    return {
        "tensor cores": 5 * n * (half * (2 * p * p * q + 2 * p**3) + 2 * p * p * q),
        "memory": 5 * n * (6 * p * q + 8 * p * p),
    }


def _adam(n: int) -> sjlt.Adam:
    return sjlt.Adam(torch.zeros(n), torch.zeros(n), (0.9, 0.999), 1.0, 1.0, 1e-8, 0.0)


def works() -> list[Work]:
    """The table's rows."""
    n, rows, coordinates = PARAMETERS, 16, 1 << 20
    whole = "all of SmolLM2-135M"
    return [
        Work("AdamW, float32", whole, {"memory": 28 * n}, lambda: _adamw(torch.float32), "adamw", vector_loads=True),
        Work(
            "AdamW, bfloat16, stochastic rounding",
            whole,
            {"memory": 22 * n, "integers": PHILOX * n},
            lambda: _adamw(torch.bfloat16, stochastic_rounding=True),
            "adamw",
            vector_loads=True,
        ),
        Work(
            "8-bit AdamW, float32",
            whole,
            {"memory": 16.06 * n, "look-ups": 6 * n},
            lambda: _adamw_8bit(torch.float32),
            "adamw_8bit",
            vector_loads=True,
        ),
        Work(
            "8-bit AdamW, bfloat16, stochastic rounding",
            whole,
            {"memory": 10.06 * n, "look-ups": 6 * n, "integers": PHILOX * n},
            lambda: _adamw_8bit(torch.bfloat16, stochastic_rounding=True),
            "adamw_8bit",
            vector_loads=True,
        ),
        Work(
            "Newton-Schulz, 5 steps, bfloat16",
            "4096 x 4096",
            _newton_schulz(1, 4096, 4096),
            lambda: symmetric.polynomial(torch.zeros(1, 256, 256, dtype=torch.bfloat16), 1.0, 1.0),
            "symmetric",
            tensor_cores=True,
        ),
        Work(
            "Newton-Schulz, 5 steps, bfloat16",
            "90 x 576 x 1536",
            _newton_schulz(90, 576, 1536),
            lambda: symmetric.gram(torch.zeros(2, 576, 1536, dtype=torch.bfloat16)),
            "symmetric",
            tensor_cores=True,
        ),
        Work(
            "rows to unit RMS, float32",
            "4096 x 4096",
            {"memory": 8 * 4096**2},
            lambda: unit_rms.unit_rms(torch.zeros(16, 4096), -1, 1e-8),
            "unit_rms",
            vector_loads=True,
        ),
        Work(
            "columns to unit RMS, float32",
            "4096 x 4096",
            {"memory": 12 * 4096**2},
            lambda: unit_rms.unit_rms(torch.zeros(128, 4096), -2, 1e-8),
            "unit_rms",
            vector_loads=True,
        ),
        Work(
            "SJLT of Adam's directions, float32",
            f"{rows} rows of 2^20 to 8192",
            {"memory": 4 * coordinates * rows + 8 * coordinates, "atomics": rows * coordinates},
            lambda: sjlt.add_sjlt(torch.zeros(16, 8192), torch.zeros(16, 4096), 1 << 40, _adam(4096)),
            "sjlt",
            vector_loads=True,
        ),
        Work(
            "perturbation, float32",
            whole,
            {"memory": 8 * n, "integers": PHILOX * n},
            lambda: perturb.add_normals_(torch.zeros(1 << 14), 1e-3, 1 << 40),
            "perturb",
            vector_loads=True,
        ),
        Work(
            "perturbation, bfloat16",
            whole,
            {"memory": 4 * n, "integers": PHILOX * n},
            lambda: perturb.add_normals_(torch.zeros(1 << 14, dtype=torch.bfloat16), 1e-3, 1 << 40),
            "perturb",
            vector_loads=True,
        ),
    ]


def predicted(counts: dict[str, float]) -> tuple[float, str]:
    """Seconds, and what bounds them."""
    return max((amount / RATES[what], what) for what, amount in counts.items())


def caught(launch: Callable[[], object]) -> list[tuple[Any, list[Any], dict[str, Any]]]:
    """The launches that a function makes, none of which runs: (kernel, arguments, settings)."""
    found: list[tuple[Any, list[Any], dict[str, Any]]] = []

    def catch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **settings: Any) -> None:
        found.append((kernel, list(args), settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "launch", catch)
        patch.setattr(backend, "use_triton", lambda *tensors: True)
        launch()
    return found


def compiled(kernel: Any, args: Sequence[Any], settings: dict[str, Any], capability: int) -> Compiled:
    """The kernel for these arguments, as Triton would specialise it at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in settings.items() if k in names}
    options = {k: v for k, v in settings.items() if k not in names}
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if name in constant:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = (
                "*"
                + {
                    torch.float32: "fp32",
                    torch.bfloat16: "bf16",
                    torch.float16: "fp16",
                    torch.int64: "i64",
                    torch.uint8: "u8",
                }[value.dtype]
            )
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and kernel.params[i].annotation == "":
            signature[name], constants[name] = "constexpr", 1
        else:
            wide = kernel.params[i].annotation != "" or not -(2**31) <= value < 2**31
            signature[name] = "i64" if wide else "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True} | options,
    )
    registers, stack = _resources(made.asm["cubin"])
    return Compiled(kernel.__name__, registers, made.metadata.shared, stack, made.metadata.num_warps, made.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as the disassembler in the triton package reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def table() -> list[dict[str, Any]]:
    """Every kernel compiled for every target, with its prediction: plain values."""
    out: list[dict[str, Any]] = []
    for work in works():
        seconds, bound = predicted(work.counts)
        launches = caught(work.launch)
        for kernel, args, settings in {launch[0].__name__: launch for launch in launches}.values():
            row: dict[str, Any] = {
                "name": work.name,
                "size": work.size,
                "kernel": kernel.__name__,
                "file": work.file,
                "bound": bound,
                "microseconds": round(1e6 * seconds, 1),
                "targets": {},
            }
            for capability in TARGETS:
                made = compiled(kernel, args, settings, capability)
                row["targets"][f"sm_{capability}"] = {
                    "registers": made.registers,
                    "shared": made.shared,
                    "stack": made.stack,
                    "warps": made.warps,
                    "vector_loads": len(re.findall(r"ld\.global\S*\.v[24]", made.ptx)) if work.vector_loads else None,
                    "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", made.ptx))
                    if work.tensor_cores
                    else None,
                }
            out.append(row)
    return out


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of optim/kernels/README.md."""
    import triton

    lines = [
        f"Compiled by Triton {triton.__version__}; registers per thread, shared memory, stack (spills) in bytes.",
        "",
        "| kernel | at | bound by | predicted, H100 | sm_80 | sm_90 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{t['registers']}, {t['shared']}, {t['stack']}" for t in row["targets"].values()]
        lines.append(
            f"| {row['name']} (`{row['kernel']}`) | {row['size']} | {row['bound']} | "
            f"{row['microseconds']:g} us | {' | '.join(cells)} |"
        )
    general = 1e6 * 5 * (4 * 4096**3 + 2 * 4096**3) / RATES["tensor cores"]
    lines += ["", f"Newton-Schulz at 4096 x 4096 by general products, 5 (4 p^2 q + 2 p^3) FLOP: {general:.1f} us."]
    return "\n".join(lines)


def write_readme(rows: Sequence[dict[str, Any]]) -> None:
    """The table between its two marks."""
    before, rest = README.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n\n{markdown(rows)}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    if backend.interpreted or (backend.triton is None and os.environ.get("OPTIM_BACKEND") != "triton"):
        # what kernels are made for is decided when they are imported: once more, for compiling them
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OPTIM_BACKEND": "triton"}
        command = [sys.executable, "-m", "tests.benchmarks.kernels", *arguments]
        return subprocess.run(command, env=environment).returncode
    if backend.triton is None:
        print("triton is not installed; pip install triton", file=sys.stderr)
        return 1
    unknown = set(arguments) - {"--readme", "--json"}
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; the options are --readme and --json", file=sys.stderr)
        return 2
    rows = table()
    if "--json" in arguments:
        print(json.dumps(rows))
        return 0
    from tests.benchmarks.measure import Report, Settings

    title = "Triton kernels: predicted on an H100 SXM from counted work, compiled for sm_80 and sm_90"
    report = Report("kernels", title, Settings.read())
    for row in rows:
        report.add(
            f"{row['name']}, {row['size']}: `{row['kernel']}`, bound by {row['bound']}",
            row["microseconds"],
            "us predicted",
            compiled=row["targets"],
        )
    report.notes.append("nothing is measured here: see tests/benchmarks/kernels.py for what is counted and the rates")
    with tempfile.TemporaryDirectory() as folder:
        report.write(Path(folder))
    print(markdown(rows))
    if "--readme" in arguments:
        write_readme(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
