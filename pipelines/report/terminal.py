"""The summary of a selection in the terminal, in 80 columns."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, OverflowMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipelines.report.audit_section import UNAUDITED, Arm, arms, is_baseline, verdict
from pipelines.report.page import SHOWN_EXAMPLES
from pipelines.report.race_section import race_section
from pipelines.report.summary import cost_section, examples_of, method_of, model_section, sources_section, warnings_of
from pipelines.report.values import Json, finite, listing, mapping, share_of
from pipelines.texts import NBSP, count, duration, percent, size, visible

TERMINAL_SOURCES = 12


def show(summary: Json, console: Console) -> None:
    """Print the summary of a run in 80 columns: what was chosen, why, at what cost, and whether to trust it.

    Every text of the run is printed literally: control and bidirectional characters as <U+202E>, and without rich's
    markup.

    Args:
        summary: The content of summary.json.
        console: Where to print.
    """
    width, encoding = min(80, console.width), console.encoding or "utf-8"
    cut: OverflowMethod = "ellipsis" if encoding.lower().startswith("utf") else "crop"

    def literal(value: object, style: str = "") -> Text:
        text = visible(str(value).replace(NBSP, " "))
        return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)

    def say(value: object, style: str = "") -> None:
        console.print(Padding(literal(value, style), (0, 0, 0, 2)), width=width)

    def show(heads: str, rows: Sequence[Sequence[object]], widest: Sequence[int] = (24,), fill: bool = False) -> None:
        """Print a table; heads are separated by '|', left-aligned if a space follows; `widest` limits columns."""
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False, expand=fill)
        for i, head in enumerate(heads.split("|")):
            left, most = i == 0 or head.endswith(" "), widest[i] if i < len(widest) and widest[i] else None
            table.add_column(
                head.strip(), justify="left" if left else "right", max_width=most, no_wrap=True, overflow=cut
            )
        if fill:
            table.columns[-1].ratio = 1  # the last column takes the remaining width
        for row in rows:
            table.add_row(*(value if isinstance(value, Text) else literal(value) for value in row))
        console.print()
        console.print(Padding(table, (0, 0, 0, 2)), width=width)

    audit = mapping(summary.get("audit"))
    table = arms(audit, str(summary.get("method")))
    _say_chosen(summary, table, say)

    if table:
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
                for a in table
            ],
        )
        state, sentence = verdict(table, audit)
        say(sentence, {"good": "green", "bad": "red"}.get(state, ""))

    if race := race_section(summary):
        for metric in race["tables"]:
            show(
                f"{metric['label']}|mean|difference|95 % interval| ",
                [
                    (
                        literal(row["label"], "bold" if row["kept"] else ""),
                        *(row[key] for key in ("mean", "difference", "interval", "word")),
                    )
                    for row in metric["rows"]
                ],
            )
        say(race["verdict"], {"good": "green"}.get(race["state"], ""))

    shares = sources_section(summary, most=TERMINAL_SOURCES)
    if shares:
        keys = ("name", "pool", "chosen", "pool_share", "chosen_share", "lift_text")
        show("source|pool|chosen|of pool|of chosen|over/under", [[row[key] for key in keys] for row in shares["rows"]])

    best = examples_of(summary.get("best"))[:SHOWN_EXAMPLES]
    if best:
        rows = [(x["source"], x["score"], _end(x["where"], 20), " ".join(x["prompt"][:120].split())) for x in best]
        show("best rows|score|where |begins ", rows, widest=(18, 0, 20), fill=True)

    console.print()
    _say_cost(summary, say)
    if not table:
        baseline = is_baseline(str(summary.get("method")))
        say("not audited: " + ("a baseline, which serves only for comparison" if baseline else UNAUDITED), "yellow")


def _end(text: str, most: int) -> str:
    """Return the last `most` characters: of a long path, the file and the line."""
    return text if len(text) <= most else ".." + text[2 - most :]


def _say_chosen(summary: Json, table: Sequence[Arm], say: Callable[..., None]) -> None:
    pool, budget = mapping(summary.get("pool")), mapping(summary.get("budget"))
    (rows, tokens), (of, all_tokens) = ([finite(x.get(key)) for key in ("rows", "tokens")] for x in (budget, pool))
    say(f"{count(rows)} of {count(of)} rows chosen", "bold")
    if tokens is not None:
        share, token_share = share_of(rows, of), share_of(tokens, all_tokens)
        say(f"{percent(share)} of the rows, {count(tokens)} tokens ({percent(token_share)})")
    model, formula = model_section(summary), mapping(summary.get("formula"))
    facts = [method_of(summary)[0], str(formula.get("name") or ""), model["name"] if model else ""]
    say(", ".join(fact for fact in facts if fact))
    if model and model["seen"] is not None:
        say(f"scores use {percent(model['seen'])} of the trainable parameters", "yellow" if model["low"] else "")
    for item in warnings_of(summary, table, None):
        say(f"warning: {item}", "yellow")


def _say_cost(summary: Json, say: Callable[..., None]) -> None:
    pool = mapping(summary.get("pool"))
    unread = sum(finite(item.get("count")) or 0 for item in listing(pool.get("bad")))
    faults = (
        (unread, "bad"),
        (finite(pool.get("duplicates")), "duplicate"),
        (finite(pool.get("cut_rows")), "cut"),
    )
    if any(n for n, _ in faults):
        say("rows with a fault: " + ", ".join(f"{count(n)} {word}" for n, word in faults if n))
    cost = cost_section(summary)
    if cost and cost["took"] is not None:
        guess = f" (estimated {duration(cost['guess'])})" if cost["guess"] else ""
        disk = f", {size(cost['bytes'])} on disk" if cost["bytes"] else ""
        say(f"took {duration(cost['took'])}{guess}{disk}" + (f", {size(cost['peak'])} memory" if cost["peak"] else ""))
