"""Hostile text in a run changes neither the page nor the terminal, and a browser asks for nothing."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines import texts
from pipelines.report import select_page, terminal
from tests.pipelines.report.made_up import make_run, printed, words

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# ---------------------------------------------------------------------------------------- a run folder, made up here


class Tags(HTMLParser):
    """Every start tag with its attributes, but for the badges that stand for hidden characters."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, attrs) != ("span", [("class", "u")]) and tag != "wbr":
            self.found.append((tag, dict(attrs)))


# ---------------------------------------------------------------------------------------- hostile text


PAYLOADS = (
    "</title><script>hit()</script>",
    "</style><script>hit()</script><style>",
    "--></textarea></svg></p></details><script src=//HOST/a.js></script>",
    "<img src=//HOST/b.png onerror=hit()>",
    "<svg/onload=hit()><animate onbegin=hit() attributeName=x dur=1s>",
    '" onmouseover=hit() autofocus onfocus=hit() x="',
    "' style='background:url(//HOST/c.png)' onclick='hit()",
    '<a href="javascript:hit()">open</a><base href=//HOST/><meta http-equiv=refresh content=0;url=//HOST/d>',
    "<iframe srcdoc='<script>parent.hit()</script>' src=//HOST/e></iframe><object data=//HOST/f></object>",
    "<style>@import url(//HOST/g.css);*{background:url(//HOST/h)}</style><link rel=stylesheet href=//HOST/i.css>",
    "{{ 7 * 191 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}{# #}",
    "[bold red]not bold[/bold red] [link=http://HOST/]x[/link] :smile:",
    "a\u202eb\u2066c\u200bd\ufeffe\x1b[31mf\x1b]8;;http://HOST/\x07g\x00h\x9bi\u2028j\U000e0041k\rl\nm\tn",
)


def spread(value: Any, payload: str) -> Any:
    """`value` with every string replaced; keys and the method's name stay."""
    if isinstance(value, dict):
        return {key: part if key == "method" else spread(part, payload) for key, part in value.items()}
    if isinstance(value, list):
        return [spread(part, payload) for part in value]
    return payload if isinstance(value, str) else value


def hostile_run(folder: Path, payload: str, n: int = 120) -> dict[str, Any]:
    """A run in which each text field of both files is `payload`."""
    summary: dict[str, Any] = spread(make_run(folder, n), payload)
    for i, row in enumerate([*summary["sources"], *summary["target"]["subtasks"]]):
        row["source" if "source" in row else "name"] = f"{payload}{i}"
    for name in ("seeds", "versions"):
        summary[name] = {payload: payload}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    table["_source"] = [payload + source for source in table["_source"]]
    table["_status"] = [status if status == "ok" else payload for status in table["_status"]]
    pq.write_table(
        pa.table(
            {
                f"subtask:{payload}{name[8:]}" if name.startswith("subtask:") else name: values
                for name, values in table.items()
            }
        ),
        folder / "scores.parquet",
    )
    return summary


def test_page_forbids_scripts_and_network_to_itself(less: tuple[Path, dict[str, Any], str]) -> None:
    found = Tags(less[2]).found
    policy = [attrs["content"] for tag, attrs in found if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1 and policy[0] is not None and policy[0].startswith(CSP)
    before = [tag for tag, _ in found][: next(i for i, (_, a) in enumerate(found) if "http-equiv" in a)]
    assert before == ["html", "head", "meta"]  # nothing can load before the policy stands
    check_tags(found)


def check_tags(found: list[tuple[str, dict[str, str | None]]]) -> None:
    tags = {tag for tag, _ in found}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "input",
        "audio",
        "video",
        "image",
        "use",
        "animate",
        "set",
        "foreignobject",
        "template",
        "textarea",
        "noscript",
    }
    for tag, attrs in found:
        assert not [
            name
            for name in attrs
            if name.startswith("on") or name in ("src", "srcdoc", "srcset", "action", "xlink:href")
        ]
        assert re.fullmatch(r"#[a-z]+", attrs.get("href") or "#a"), (tag, attrs)
        style = attrs.get("style") or ""
        assert re.fullmatch(r"((left|width|bottom|height):[\d.]+(%|px)?;?)*", style), style
    assert tags.issuperset({"main", "section"})


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_does_not_change_the_page(tmp_path: Path, payload: str) -> None:
    """The page's tags are those of a page with a harmless word in each field: no text can open, close or alter one."""
    hostile_run(tmp_path / "bad", payload)
    hostile_run(tmp_path / "good", "word")
    bad, good = (select_page.render(tmp_path / name).read_text(encoding="utf-8") for name in ("bad", "good"))
    tags = [
        [(tag, {k: v for k, v in attrs.items() if k != "aria-label"}) for tag, attrs in Tags(page).found]
        for page in (bad, good)
    ]
    assert tags[0] == tags[1]
    check_tags(Tags(bad).found)
    assert "1337" not in words(bad)
    assert texts.visible(bad, "\n\t") == bad


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_is_printed_literally(tmp_path: Path, payload: str) -> None:
    summary = hostile_run(tmp_path, payload)
    text = printed(summary)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert all(len(line) <= 80 for line in text.splitlines())
    if "[bold red]" in payload:
        assert "[bold red]not bold[/bold red]" in text and ":smile:" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminal_of_any_encoding(less: tuple[Path, dict[str, Any], str], encoding: str) -> None:
    summary = json.loads(json.dumps(less[1]))
    summary["best"][0]["prompt"] = "naïve 数 \ud800 \U0001f600"
    raw = BytesIO()
    console = Console(file=TextIOWrapper(raw, encoding=encoding, write_through=True), width=80)
    terminal.show(summary, console)
    assert b"100 of 2,000 rows chosen" in raw.getvalue()


def test_terminal_fits_80_columns_and_says_the_same(less: tuple[Path, dict[str, Any], str]) -> None:
    text = printed(less[1])
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 60
    for part in (
        "100 of 2,000 rows chosen",
        "less-paper",
        "96.1 % of the trainable",
        "1.4117",
        "+0.0503",
        "word_problems",
        "13 min 33 s (estimated 11 min 42 s)",
        "12 bad, 31 duplicate, 25 cut",
        "Held-out loss is 0.0503 lower",
    ):
        assert part in re.sub(r"\s+", " ", text)
    assert "…" not in text.split("best rows")[0]  # no number is cut


# ---------------------------------------------------------------------------------------- a browser


class Canary(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Canary)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def browse(browser: str, page: Path, profile: Path) -> str:
    """The page's tree after it was opened and all it wanted to run has run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=3000",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run([browser, *flags, "--dump-dom", page.as_uri()], capture_output=True, timeout=120)
    if done.returncode or b"<html" not in done.stdout:
        pytest.skip(f"{browser} does not run here: {done.stderr[-300:]!r}")
    return done.stdout.decode("utf-8", "replace")


def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path: Path, server: HTTPServer) -> None:
    """Hostile rows in each field, opened in a real browser; the same texts unescaped prove that the trap is live."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine: the report's scripts-off promise is tested on its tags only")
    host = f"127.0.0.1:{server.server_address[1]}"
    attack = (
        "</style>".join(PAYLOADS[:-2])
        .replace("//HOST", f"http://{host}")
        .replace("hit()", "document.documentElement.id='hit'")
    )
    bare = tmp_path / "bare.html"
    bare.write_text(
        f"<!doctype html><html><body>{attack.split('<a href')[0]}</style><img src=http://{host}/z></body></html>"
    )
    seen = browse(browser, bare, tmp_path / "profile")
    assert 'id="hit"' in seen[:300] and server.asked  # type: ignore[attr-defined]

    server.asked.clear()  # type: ignore[attr-defined]
    hostile_run(tmp_path / "run", attack)
    seen = browse(browser, select_page.render(tmp_path / "run"), tmp_path / "profile")
    assert 'id="hit"' not in seen[:300] and 'id="provenance"' in seen
    assert server.asked == []  # type: ignore[attr-defined]
