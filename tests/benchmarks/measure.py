"""Timing and results that all benchmarks share: interleaved repetitions, medians, one small JSON file each."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = ("smollm2", "tiny")
LIBRARIES = ("torch", "transformers", "peft", "numpy", "scikit-learn", "bergson", "dattri", "dattri-llm")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. "tiny" is a smoke run: small sizes, and results that nobody should cite."""

    model: str
    rows: int | None
    repeats: int | None
    seconds: float
    """No new repetition starts when it would end later than this, once two are done."""
    results: Path | None
    """None: a smoke run, results go to the test's own folder."""

    @classmethod
    def read(cls) -> "Settings":
        model = os.environ.get("DATATOOLS_BENCH_MODEL", "smollm2")
        if model not in MODELS:
            raise ValueError(f"DATATOOLS_BENCH_MODEL is {model!r}; choose one of {', '.join(MODELS)}")
        chosen = os.environ.get("DATATOOLS_BENCH_RESULTS")
        return cls(
            model=model,
            rows=number("DATATOOLS_BENCH_ROWS"),
            repeats=number("DATATOOLS_BENCH_REPEATS"),
            seconds=60.0 * (number("DATATOOLS_BENCH_MINUTES") or 5),
            results=Path(chosen) if chosen else None if model == "tiny" else RESULTS,
        )

    def size(self, full: int, tiny: int) -> int:
        """DATATOOLS_BENCH_ROWS, else the default of this kind of run."""
        return self.rows or (tiny if self.model == "tiny" else full)

    def times(self, full: int, tiny: int = 2) -> int:
        """DATATOOLS_BENCH_REPEATS, else the default of this kind of run."""
        return self.repeats or (tiny if self.model == "tiny" else full)


def number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and (not text.isdecimal() or int(text) < 1):
        raise ValueError(f"{name} is {text!r}; expected a whole number, at least 1")
    return int(text) if text else None


def machine() -> dict[str, Any]:
    """What the numbers depend on, without the machine's name."""
    import psutil
    import torch

    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].strip() if names else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "cores_usable": usable,
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Sample:
    """One timed call: wall seconds, CPU seconds of all threads and of child processes, and what the call returned."""

    seconds: float
    cpu_seconds: float
    value: Any


def timed(arm: Callable[[], Any]) -> Sample:
    gc.collect()
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    value = arm()
    return Sample(time.perf_counter() - wall, sum(os.times()[:4]) - cpu, value)


def interleaved(
    arms: Mapping[str, Callable[[], Any]], repeats: int, seconds: float = float("inf")
) -> dict[str, list[Sample]]:
    """Every arm once a repetition, in an order that moves on by one each time, so that drift hits all alike.

    Stops early when another repetition would not fit in `seconds`, but never before the second.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    names, started = list(arms), time.perf_counter()
    for repetition in range(repeats):
        spent = time.perf_counter() - started
        if repetition >= 2 and spent + spent / repetition > seconds:
            break
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(timed(arms[name]))
            print(f"  {repetition + 1}/{repeats} {name}: {samples[name][-1].seconds:.3g} s", flush=True)
    return samples


def median(samples: list[Sample]) -> float:
    return statistics.median(sample.seconds for sample in samples)


def ratio(samples: list[Sample], base: list[Sample], *, scale: float = 1.0) -> float:
    """The median over repetitions of time / time of `base` in the same repetition: a slow minute cancels."""
    return scale * statistics.median(a.seconds / b.seconds for a, b in zip(samples, base, strict=True))


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How much the process grows at most while `call` runs; None where the system does not say.

    By the kernel's high-water mark, reset before: `ru_maxrss` starts, in a child process, from its parent's.
    """
    status = Path("/proc/self/status")
    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident(status, "VmRSS")
        call()
        return max(0, _resident(status, "VmHWM") - before)
    except OSError:
        return None


def _resident(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@dataclass
class Report:
    """The results of one benchmark; `write` stores them as `<name>.json` and prints them as a table."""

    name: str
    title: str
    settings: Settings
    workload: dict[str, Any] = field(default_factory=dict)
    """Shapes, counts, sizes: what was measured, in numbers."""
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    started: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"))
    load_before: float = field(default_factory=lambda: _load())

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        **more: Any,
    ) -> None:
        """One row of the table; with an aim, whether it was met. An aim missed is reported, it fails no test."""
        row: dict[str, Any] = {"what": what, "value": _short(value), "unit": unit}
        if at_most is not None:
            row |= {"aim": f"<= {at_most:g}", "met": bool(value <= at_most)}
        if at_least is not None:
            row |= {"aim": f">= {at_least:g}", "met": bool(value >= at_least)}
        self.results.append(row | more)

    def keep(self, samples: Mapping[str, list[Sample]]) -> None:
        """Store each repetition's wall and CPU seconds."""
        for name, list_ in samples.items():
            self.samples[name] = [{"seconds": _short(s.seconds), "cpu_seconds": _short(s.cpu_seconds)} for s in list_]

    def write(self, fallback: Path) -> Path:
        folder = self.settings.results or fallback
        folder.mkdir(parents=True, exist_ok=True)
        body = {
            "name": self.name,
            "title": self.title,
            "date": self.started,
            "model": self.settings.model,
            "machine": machine(),
            "load": {"before": self.load_before, "after": _load()},
            "repetitions": max((len(list_) for list_ in self.samples.values()), default=0),
            "workload": self.workload,
            "results": self.results,
            "notes": self.notes,
            "samples": self.samples,
        }
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        print(f"\n{render(body)}\nwritten to {path}", flush=True)
        return path


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _load() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def render(body: Mapping[str, Any]) -> str:
    """A result as Markdown: where and when, the table, the notes."""
    m = body["machine"]
    smoke = " SMOKE RUN: small sizes, not to be cited." if body["model"] == "tiny" else ""
    shapes = ", ".join(f"{key} {_plain(value)}" for key, value in body["workload"].items())
    lines = [
        f"### {body['title']}",
        "",
        f"{body['date']}; {m['cpu']}, {m['cores_usable']} of {m['cores']} cores, {m['torch_threads']} torch threads, "
        f"{m['instructions']}, {m['memory_gib']} GiB; load {body['load']['before']:g} before, "
        f"{body['load']['after']:g} after; torch {m['libraries'].get('torch', '?')}; medians of {body['repetitions']} "
        f"repetitions.{smoke}",
        "",
        *([f"Measured: {shapes}.", ""] if shapes else []),
    ]
    table = [["what", "value", "unit", "aim", "met"]]
    for row in body["results"]:
        met = {True: "yes", False: "no", None: ""}[row.get("met")]
        table.append([row["what"], _plain(row["value"]), row["unit"], row.get("aim", ""), met])
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    for i, line in enumerate(table):
        cells = [c.rjust(w) if j == 1 else c.ljust(w) for j, (c, w) in enumerate(zip(line, widths, strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
        if i == 0:
            lines.append("|" + "|".join("-" * (w + 1) + (":" if j == 1 else "-") for j, w in enumerate(widths)) + "|")
    lines += ["", *(f"- {note}" for note in body["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
