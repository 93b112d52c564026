"""A plan in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipelines.texts import NBSP, count, duration, percent, plural, size, visible


def show(found: dict[str, Any]) -> None:
    """Print a plan on stdout, in 80 columns.

    Args:
        found: The plan, as `pipelines.engines.plan.run.plan` returns it.
    """
    console = Console(width=80, highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Padding(Text(visible(text.replace(NBSP, " ")), style=style), (0, 0, 0, 2)))

    job, hardware, seconds = found["job"], found["hardware"], found["seconds"]
    of = f" with {_short(job['parameters'])} parameters" if job["parameters"] else ""
    say(f"{_short(job['rows'])} rows of {job['tokens_per_row']:,.0f} tokens, method {job['method']}{of}", "bold")
    say(
        f"{plural(hardware['workers'], 'worker')} ({hardware['kind']}) on {plural(hardware['nodes'], 'machine')}, "
        f"engine {hardware['engine']}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name, justify in (("stage", "left"), ("takes", "right"), ("share", "right"), ("limited by", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in found["stages"]:
        table.add_row(row["stage"], duration(row["seconds"]), percent(row["share"]), row["bound"])
    console.print()
    console.print(Padding(table, (0, 0, 0, 2)))
    console.print()
    say(
        f"{duration(seconds['median'])} in all ({duration(seconds['least'])} to {duration(seconds['most'])} in "
        f"simulated runs), {found['gpu_hours']:,.1f} worker-hours",
        "bold",
    )
    say(
        f"without trouble {duration(seconds['even'])}; slow workers add {duration(seconds['added_by_stragglers'])}, "
        f"{found['lost_workers']:,.1f} lost workers add {duration(seconds['added_by_failures'])}"
    )
    flops = sum(found["flops"].values())
    say(f"{flops:.2e} operations; {size(sum(found['disk_bytes'].values()))} on disk; {size(found['network_bytes'])} "
        "over the network")  # fmt: skip
    say(
        f"memory: {size(found['memory_bytes'])} of {count(hardware['memory_gb'])} GB per worker, "
        f"{size(found['host_memory_bytes'])} of main memory per machine"
    )
    end = found["bottleneck"]
    say(f"bottleneck: {end['stage']} ({percent(end['share'])} of the time), limited by {end['by']}", "bold")
    for text in found["advice"]:
        say(text, "yellow" if not found["fits"] else "")
    say(f"figures: {hardware['source']}; see --json for all of them", "dim")


def _short(value: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= (unit if unit > 1e3 else 1e4):
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}"
