"""The report of a run: one HTML file without script, and the summary at the end in the terminal.

`render` reads nothing but `summary.json` and `scores.parquet` of a run folder, so a report can be drawn again at any
time, and equal inputs give equal bytes. Texts of data rows are hostile until shown: every value that the template prints
passes through one function (`finalize=marked`) that escapes it and makes control and bidi characters visible, so that
forgetting a filter is not possible; no data reaches a link, a style or a script; and the page forbids scripts and the
network to itself by its Content-Security-Policy.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from datatools import files
from pipelines import report_view as view
from pipelines.report_view import Json
from pipelines.texts import NBSP, breakable, count, duration, marked, percent, plural, signed, size, visible

__all__ = ["render", "terminal", "visible"]

SHOWN_EXAMPLES = 3  # examples open at once; the others fold out


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=marked,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": visible,
        "breakable": breakable,
        "count": count,
        "percent": percent,
        "duration": duration,
        "size": size,
        "plural": plural,
    }
    return environment


def render(folder: Path) -> Path:
    """Draw folder/report.html from folder/summary.json and folder/scores.parquet; returns the path written.

    One file: no script, no network, light and dark. Equal inputs give equal bytes. Parts that a method does not have
    (scores of a random draw, an audit not run) are left out.

    Raises: DataError if either file is missing, damaged or without a column it must have; EnvironmentProblem if the
    report cannot be written.
    """
    folder = Path(folder)
    summary = view.read_summary(folder / "summary.json")
    scores = view.read_scores(folder / "scores.parquet")
    view = view.build(summary, scores)
    page = _environment().get_template("report.html").render(view, shown=SHOWN_EXAMPLES)
    path = folder / "report.html"
    files.write_text(path, page)
    return path


def terminal(summary: Json, console: Console) -> None:
    """Print the end of a run to `console`, in 80 columns: what was chosen, why, at what cost, and whether to trust it.

    Every text of the run is printed literally: controls and bidi characters as <U+202E>, rich's own markup not read.
    """

    def literal(value: object, style: str = "") -> Text:
        text = visible(str(value)).replace(NBSP, " ")
        encoding = console.encoding or "utf-8"
        return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)

    def say(value: object, style: str = "", indent: int = 2) -> None:
        console.print(Padding(literal(value, style), (0, 0, 0, indent)), width=min(80, console.width))

    def show(table: Table) -> None:
        console.print(Padding(table, (0, 0, 0, 1)), width=min(80, console.width))

    def grid(*heads: str) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, expand=False)
        for i, head in enumerate(heads):
            right = i > 0 and not head.endswith(" ")
            table.add_column(
                head.strip(),
                justify="right" if right else "left",
                overflow="ellipsis",
                no_wrap=True,
                max_width=24 if i == 0 else None,
            )
        return table

    pool, budget = view.mapping(summary.get("pool")), view.mapping(summary.get("budget"))
    method, _ = view.method_of(summary)
    formula, model = view.mapping(summary.get("formula")), view.model_section(summary)
    table = view.arms(view.mapping(summary.get("audit")), str(summary.get("method")))
    rows, of = view.finite(budget.get("rows")), view.finite(pool.get("rows"))
    tokens, all_tokens = view.finite(budget.get("tokens")), view.finite(pool.get("tokens"))

    console.print()
    say(f"{count(rows)} of {count(of)} rows chosen", "bold")
    if tokens is not None:
        say(f"{percent(view.share_of(rows, of))} of the rows, {count(tokens)} tokens ({percent(view.share_of(tokens, all_tokens))})")
    facts = [method, str(formula.get("name") or ""), model["name"] if model else ""]
    say(", ".join(fact for fact in facts if fact))
    if model and model["seen"] is not None:
        say(f"scores see {percent(model['seen'])} of the trainable parameters", "yellow" if model["low"] else "")
    for i, item in enumerate(view.warnings_of(summary, None)):
        if not i:
            console.print()
        say(f"warning: {item}", "yellow")

    if table:
        lines = grid("held-out loss", "mean", "interval", "difference", "selection is ")
        words = {"better": "better", "worse": "worse", "unclear": "not clearly better", "": ""}
        for arm in table:
            between = "" if arm.low is None or arm.high is None else f"{arm.low:.4f} {arm.high:.4f}"
            lines.add_row(
                literal(arm.label, "bold" if arm.chosen else ""),
                literal("" if arm.mean is None else f"{arm.mean:.4f}"),
                literal(between),
                literal("" if arm.chosen else signed(arm.delta)),
                words[arm.reading],
            )
        console.print()
        show(lines)
        state, sentence = view.verdict(table, str(view.mapping(summary.get("audit")).get("verdict") or "") or None)
        say(sentence, {"good": "green", "bad": "red"}.get(state, ""))

    shares = view.sources_section(summary)
    if shares:
        lines = grid("source", "pool", "chosen", "of pool", "of chosen", "over/under")
        for row in shares["rows"][:12]:
            lines.add_row(
                *(
                    literal(text)
                    for text in (
                        row["name"],
                        count(row["pool"]),
                        count(row["chosen"]),
                        percent(row["pool_share"]),
                        percent(row["chosen_share"]),
                        row["lift_text"],
                    )
                )
            )
        console.print()
        show(lines)
        if len(shares["rows"]) > 12:
            say(f"and {plural(len(shares['rows']) - 12, 'more source')}: see the report", "dim")

    best = view.examples_of(summary.get("best"))[:SHOWN_EXAMPLES]
    if best:
        lines = grid("best rows", "score", "where ", "begins ")
        lines.columns[0].max_width, lines.columns[2].max_width, lines.columns[3].ratio = 18, 20, 1
        lines.expand = True
        for item in best:
            first = " ".join(item["prompt"][:120].split(" "))
            lines.add_row(literal(item["source"]), literal(item["score"]), literal(item["where"]), literal(first))
        console.print()
        show(lines)

    quality = []
    unread = sum(view.finite(item.get("count")) or 0 for item in view.listing(pool.get("bad")))
    for n, words_ in (
        (unread, "bad"),
        (view.finite(pool.get("duplicates")), "duplicate"),
        (view.finite(pool.get("cut_rows")), "cut"),
    ):
        if n:
            quality.append(f"{count(n)} {words_}")
    console.print()
    if quality:
        say(f"rows with a fault: {', '.join(quality)}")
    cost = view.cost_section(summary)
    if cost and cost["took"] is not None:
        guess = f" (estimated {duration(cost['guess'])})" if cost["guess"] is not None else ""
        disk = f", {size(cost['bytes'])} on disk" if cost["bytes"] is not None else ""
        peak = view.finite(view.mapping(view.mapping(summary.get("cost")).get("after")).get("peak_rss_bytes"))
        say(f"took {duration(cost['took'])}{guess}{disk}" + (f", {size(peak)} memory" if peak else ""))
    if not table and str(summary.get("method")) not in view.RANDOM_ARMS:
        say("not audited: nothing here shows yet that these rows beat random ones", "dim")
