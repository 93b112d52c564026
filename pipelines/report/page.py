"""The report of a run: one HTML file without script, and the summary at the end in the terminal.

`render` reads nothing but `summary.json` and `scores.parquet` of a run folder, so a report can be drawn again at any
time, and equal inputs give equal bytes. Texts of data rows are hostile until shown: every value that the template
prints passes through one function (`finalize=marked`) that escapes it and makes control and bidi characters visible, so
that forgetting a filter is not possible; no data reaches a link, a style or a script; and the page forbids scripts and
the network to itself by its Content-Security-Policy.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from rich import box
from rich.console import Console, OverflowMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from datatools import DataError, files
from pipelines.report import view
from pipelines.report.view import Json
from pipelines.runs import verdicts
from pipelines.texts import NBSP, breakable, count, duration, first_line, marked, percent, plural, size, visible

__all__ = ["render", "terminal", "visible"]

SHOWN_EXAMPLES = 3  # examples open at once; the others fold out
TERMINAL_SOURCES = 12


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


@contextmanager
def damaged(path: Path | str, remedy: str) -> Iterator[None]:
    """Inside, values of `path` that are missing or of another type than was written are a DataError with the remedy."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, pa.ArrowException, TemplateError,
            AssertionError, RecursionError, StopIteration) as error:  # fmt: skip
        raise DataError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}); {remedy}") from error


def page(template: str, /, **parts: object) -> str:
    """A page of `templates/` with these parts, escaped and made visible as the module says."""
    return _environment().get_template(template).render(parts)


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
    with damaged(folder / "summary.json", "run the same command again to write it anew"):
        parts = view.build(verdicts.checked(folder, summary), scores)
        text = page("report.html", **parts, shown=SHOWN_EXAMPLES)
    return _written(folder, text)


def render_audit(folder: Path) -> Path:
    """Draw folder/report.html from folder/audit.json; returns the path written.

    Raises: DataError for a damaged file.
    """
    path = folder / "audit.json"
    found = view.read_summary(path)
    with damaged(path, "run the same audit again to write it anew"):
        text = page("audit.html", **view.audit_page(found))
    return _written(folder, text)


def _written(folder: Path, text: str) -> Path:
    path = folder / "report.html"
    files.write_text(path, text)
    return path


def terminal(summary: Json, console: Console) -> None:
    """Print the end of a run to `console`, in 80 columns: what was chosen, why, at what cost, and whether to trust it.

    Every text of the run is printed literally: controls and bidi characters as <U+202E>, rich's own markup not read.
    """
    width, encoding = min(80, console.width), console.encoding or "utf-8"
    cut: OverflowMethod = "ellipsis" if encoding.lower().startswith("utf") else "crop"

    def literal(value: object, style: str = "") -> Text:
        text = visible(str(value).replace(NBSP, " "))
        return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)

    def say(value: object, style: str = "") -> None:
        console.print(Padding(literal(value, style), (0, 0, 0, 2)), width=width)

    def show(heads: str, rows: Sequence[Sequence[object]], widest: Sequence[int] = (24,), fill: bool = False) -> None:
        """A table; heads parted by '|', left where a space follows; `widest` limits the first columns."""
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, expand=fill)
        for i, head in enumerate(heads.split("|")):
            left, most = i == 0 or head.endswith(" "), widest[i] if i < len(widest) and widest[i] else None
            table.add_column(
                head.strip(), justify="left" if left else "right", max_width=most, no_wrap=True, overflow=cut
            )
        if fill:
            table.columns[-1].ratio = 1  # the last column takes what the others leave
        for row in rows:
            table.add_row(*(value if isinstance(value, Text) else literal(value) for value in row))
        console.print()
        console.print(Padding(table, (0, 0, 0, 2)), width=width)

    _say_chosen(summary, say)

    audit = view.mapping(summary.get("audit"))
    arms = view.arms(audit, str(summary.get("method")))
    if arms:
        show(
            "held-out loss|mean|interval|difference|selection is ",
            [
                (
                    literal(a.label, "bold" if a.chosen else ""),
                    a.text,
                    a.between.replace(" to", ""),
                    a.difference,
                    a.word,
                )
                for a in arms
            ],
        )
        state, sentence = view.verdict(arms, audit)
        say(sentence, {"good": "green", "bad": "red"}.get(state, ""))

    shares = view.sources_section(summary, most=TERMINAL_SOURCES)
    if shares:
        keys = ("name", "pool", "chosen", "pool_share", "chosen_share", "lift_text")
        show("source|pool|chosen|of pool|of chosen|over/under", [[row[key] for key in keys] for row in shares["rows"]])

    best = view.examples_of(summary.get("best"))[:SHOWN_EXAMPLES]
    if best:
        rows = [(x["source"], x["score"], _end(x["where"], 20), " ".join(x["prompt"][:120].split())) for x in best]
        show("best rows|score|where |begins ", rows, widest=(18, 0, 20), fill=True)

    console.print()
    _say_cost(summary, say)
    if not arms:
        baseline = str(summary.get("method")) in view.RANDOM_ARMS
        say("not audited: " + ("a baseline, made to be compared with" if baseline else view.UNAUDITED), "yellow")


def _end(text: str, most: int) -> str:
    """The last `most` characters: of a long path the file and the line."""
    return text if len(text) <= most else ".." + text[2 - most :]


def _say_chosen(summary: Json, say: Callable[..., None]) -> None:
    pool, budget = view.mapping(summary.get("pool")), view.mapping(summary.get("budget"))
    (rows, tokens), (of, all_tokens) = ([view.finite(x.get(key)) for key in ("rows", "tokens")] for x in (budget, pool))
    say(f"{count(rows)} of {count(of)} rows chosen", "bold")
    if tokens is not None:
        share, token_share = view.share_of(rows, of), view.share_of(tokens, all_tokens)
        say(f"{percent(share)} of the rows, {count(tokens)} tokens ({percent(token_share)})")
    model, formula = view.model_section(summary), view.mapping(summary.get("formula"))
    facts = [view.method_of(summary)[0], str(formula.get("name") or ""), model["name"] if model else ""]
    say(", ".join(fact for fact in facts if fact))
    if model and model["seen"] is not None:
        say(f"scores see {percent(model['seen'])} of the trainable parameters", "yellow" if model["low"] else "")
    for item in view.warnings_of(summary, None):
        say(f"warning: {item}", "yellow")


def _say_cost(summary: Json, say: Callable[..., None]) -> None:
    pool = view.mapping(summary.get("pool"))
    unread = sum(view.finite(item.get("count")) or 0 for item in view.listing(pool.get("bad")))
    faults = (
        (unread, "bad"),
        (view.finite(pool.get("duplicates")), "duplicate"),
        (view.finite(pool.get("cut_rows")), "cut"),
    )
    if any(n for n, _ in faults):
        say("rows with a fault: " + ", ".join(f"{count(n)} {word}" for n, word in faults if n))
    cost = view.cost_section(summary)
    if cost and cost["took"] is not None:
        guess = f" (estimated {duration(cost['guess'])})" if cost["guess"] else ""
        disk = f", {size(cost['bytes'])} on disk" if cost["bytes"] else ""
        say(f"took {duration(cost['took'])}{guess}{disk}" + (f", {size(cost['peak'])} memory" if cost["peak"] else ""))
