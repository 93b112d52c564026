"""What the documents show runs as it stands there: every Python block, every command, and the tables of names.

The blocks and commands of a document run from top to bottom in one new folder, which has the files that they name, made
of the suite's own tiny rows; `smollm2` and `M` are the suite's tiny model. Nothing is passed over in silence: what
cannot run here stands in `NOT_RUN` with its reason, and its flags are read all the same.
"""

import itertools
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
import yaml

from pipelines import listing
from pipelines.cli import app as cli
from pipelines.models import load as models
from tests.conftest import REPOSITORY
from tests.tiny import save_tiny_model, write_rows

HISTORY = "CHANGELOG.md"  # says what was: its commands need not be those of today
DOCUMENTS = sorted(
    str(path.relative_to(REPOSITORY))
    for top in (".", "docs", "examples", "optim", "datatools", "pipelines", "tests")
    for path in (REPOSITORY / top).glob("*.md" if top == "." else "**/*.md")
    if path.name != HISTORY
)

PROGRAMS = ("datatools", "python", "python3", "torchrun", "make", "pip", "pytest")
"""First words of a command, in a block or between backticks; a path before them and settings of the environment may
stand in front."""

NOT_RUN: dict[str, str] = {
    r"make demo": "takes minutes with a model of 135M weights, which tests marked `real` do",
    r"make (docs|lint|test|bench|gpu|zoo|mutation|attack|same BEFORE=DIR|structure)": "this suite, or minutes to hours",
    r"pip install .*": "needs the network",
    r"torchrun .*": "several processes; tests/pipelines/training/test_torchrun.py starts two",
    r"python3? -m (venv|pip) .*": "needs the network",
    r"(python -m )?pytest .*": "this suite, with a GPU, as a benchmark, or with numbers that are elsewhere",
    r"python -m tests\.benchmarks\.(?!show).*": "a measurement, minutes to hours",
    r"python -m tests\.(zoo|mutation|attack)\..*": "minutes; what they run has tests of its own",
    r"python examples/(spine|approximation)\.py": "minutes; tests/test_example_pages.py runs smaller ones",
    r"python -m pipelines\.demo_data\.make": "writes into the package; tests/pipelines/test_demo_data.py compares",
    r"python -c .*": "of an environment that is not there",
}
"""A pattern of whole commands -> why they are not run. Their flags, files and targets are looked at nevertheless."""

TEXT_BLOCKS = ("run.yaml  provenance.json", "reference.npz  reference/NN-A/", "How to register this?")
"""How blocks begin that are neither code nor commands: lists of files, examples of rows."""


SMALLER = {"--batches 32": "--batches 8", "--orders 30": "--orders 4"}
"""Sizes that take minutes, and those that stand for them."""

GIVEN = {
    "train": ("--model", "M", "--data", "pool.jsonl"),
    "order": ("--model", "M", "--data", "pool.jsonl"),
    "select": ("--model", "M", "--train", "pool.jsonl", "--target", "dev.jsonl"),
}
"""What is left out where a text mentions a command with one flag, or writes `...`: it is then read, not run."""


@dataclass(frozen=True)
class Snippet:
    """A Python block or one command, and where it stands: in a block of its own, or within a sentence."""

    document: str
    line: int
    kind: str  # "python", "command" or "mentioned"
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def snippets(document: str) -> Iterator[Snippet]:
    """All of a document, in order. Raises: AssertionError for a block that is of no known kind."""
    lines = (REPOSITORY / document).read_text(encoding="utf-8").splitlines()
    prose: list[tuple[int, str]] = []
    found: list[Snippet] = []
    i = 0
    while i < len(lines):
        fence = re.fullmatch(r"( *)(```+|~~~+) *(\w*).*", lines[i])
        if fence:
            end = next(k for k in range(i + 1, len(lines) + 1) if k == len(lines) or lines[k].strip() == fence[2])
            assert end < len(lines), f"{document}:{i + 1}: a block without an end"
            body = [line.removeprefix(fence[1]) for line in lines[i + 1 : end]]
            found += block(document, i + 2, fence[3], body)
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()) and not in_list(lines, i):
            end = next((k for k in range(i, len(lines)) if re.match(r" {0,3}\S", lines[k])), len(lines))
            found += block(document, i + 1, "", [line[4:] for line in lines[i:end]])
            i = end
        else:
            prose.append((i + 1, lines[i]))
            i += 1
    text = "\n".join(line for _, line in prose)
    for span in re.finditer(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)", text, re.S):
        words = " ".join(span[2].split())
        if program(words):
            number = prose[text[: span.start()].count("\n")][0]
            found += [Snippet(document, number, "mentioned", one) for one in alternatives(words)]
    return iter(sorted(found, key=lambda s: s.line))


def in_list(lines: list[str], i: int) -> bool:
    """Whether an indented line goes on with an item of a list."""
    before = next((line for line in reversed(lines[:i]) if line.strip() and not line.startswith(" ")), "")
    return re.match(r"[-*+] |\d+\. ", before) is not None


def block(document: str, line: int, language: str, body: list[str]) -> list[Snippet]:
    """What a block holds. In one with "$ " lines those are commands and the others what they print."""
    if language in ("python", "py", "pycon"):
        assert language != "pycon", f"{document}:{line}: write python blocks without prompts"
        return [Snippet(document, line, "python", "\n".join(body))]
    if language == "json":
        json.loads("\n".join(body))
        return []
    if language == "yaml":
        yaml.safe_load("\n".join(body))
        return []
    assert language in ("", "sh", "bash", "shell", "console", "text"), f"{document}:{line}: what is {language!r}?"
    if language == "text" or body[0].startswith(TEXT_BLOCKS):
        return []
    prompted = any(text.startswith("$ ") for text in body)
    found: list[Snippet] = []
    open_line, joined = 0, ""
    for number, text in enumerate(body, start=line):
        if not joined:
            if not text.strip() or (prompted and not text.startswith("$ ")):
                continue
            open_line, joined = number, text.removeprefix("$ ")
        else:
            joined += " " + text.strip()
        if joined.endswith("\\"):
            joined = joined.removesuffix("\\").rstrip()
            continue
        joined = re.sub(r"\s+# .*", "", joined)
        assert program(joined), f"{document}:{open_line}: neither code nor a command that is known: {joined}"
        found.append(Snippet(document, open_line, "command", joined))
        joined = ""
    assert not joined and found, f"{document}:{line}: a block without a command, or with one that does not end"
    return found


def program(words: str) -> bool:
    """Whether these words are a command, rather than the name of one."""
    first, _, rest = bare(words).partition(" ")
    return first in PROGRAMS and bool(rest.strip())


def bare(words: str) -> str:
    """Without settings of the environment and the folder of the program: `A=1 .venv/bin/python x` -> `python x`."""
    words = re.sub(r"^(\w+=\S+ +)+", "", words.strip())
    return re.sub(r"^(\.{0,2}/)?([\w.-]+/)*bin/", "", words)


def alternatives(words: str) -> list[str]:
    """`ls a|b` -> `ls a`, `ls b`."""
    parts = [re.split(r"\|", word) if re.fullmatch(r"\w+(\|\w+)+", word) else [word] for word in words.split(" ")]
    return [" ".join(chosen) for chosen in itertools.product(*parts)]


# ---------------------------------------------------------------------------------------------------------- the world


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=1, hidden=16)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder with the files that the documents name, and the current one."""
    real = models.resolve
    monkeypatch.setattr(models, "resolve", lambda name: str(tiny) if name in ("smollm2", "M") else real(name))
    monkeypatch.chdir(tmp_path)
    rows = [{"dataset": "abbcccc"[i % 7], "prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(850)]  # short
    (tmp_path / "mix-1k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "T").mkdir()
    for name, rows in {"dev": 4, "sixty": 6}.items():
        write_rows(tmp_path / "T" / f"{name}.jsonl", rows, source="t", start=900 + 10 * rows)
    return tmp_path


def rows_of_the_demo(folder: Path) -> None:
    """The demo's rows, for documents that do not write them."""
    from pipelines.demo_data import make

    if not (folder / "pool.jsonl").exists():
        make.copy(folder)


# ---------------------------------------------------------------------------------------------------------- commands


def not_run(text: str) -> str | None:
    """Why a command is not run; None if it is."""
    reasons = [reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, bare(text))]
    return reasons[0] if reasons else None


def datatools(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def run_command(snippet: Snippet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it, or look at the parts of it that can be looked at."""
    text = bare(snippet.text)
    for size, smaller in SMALLER.items():
        text = text.replace(size, smaller)
    words = shlex.split(text)
    why = not_run(snippet.text)
    if why is not None:
        look_at(snippet, words, capsys)
    elif words[0] == "datatools":
        if left_out := missing(snippet, words):
            arguments = ["record" if word == "TASK" else word for word in words[1:] if word != "..."]
            read(snippet, [*arguments, *left_out], capsys)
            return
        code, _, err = datatools(words[1:], capsys)
        assert code == 0, f"{snippet}: {snippet.text}\nexit code {code}: {err[-2000:]}"
    else:
        assert words[:2] == ["python", "-m"], f"{snippet}: {snippet.text}: run it, or say in NOT_RUN why it cannot be"
        monkeypatch.setattr(sys, "argv", words[2:])
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, f"{snippet}: {snippet.text}: {end.code}"


def missing(snippet: Snippet, words: list[str]) -> list[str]:
    """What a command that is not written out needs to be read; empty for one that is."""
    if snippet.kind == "mentioned" and len(words) == 2:  # the name of a command
        return ["--help"]
    given = GIVEN.get(words[1], ())
    absent = [(flag, value) for flag, value in zip(given[::2], given[1::2], strict=True) if flag not in words]
    whole = "..." not in words and "TASK" not in words
    if whole and (snippet.kind == "command" or not absent or not words[2].startswith("--")):
        return []
    return [*itertools.chain.from_iterable(absent), "--print-config"]


def read(snippet: Snippet, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = datatools(arguments, capsys)
    assert code == 0, f"{snippet}: {snippet.text}: {err}"


def look_at(snippet: Snippet, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is not run: its targets, modules, files, flags and markers are there."""
    where = f"{snippet}: {snippet.text}"
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.M))
        assert {word for word in words[1:] if "=" not in word} <= targets, where
    elif words[0] == "torchrun":
        at = words.index("pipelines")
        assert words[at - 1] == "-m", where
        arguments = ["datatools", *words[at + 1 :]]
        left_out = missing(snippet, arguments) or ["--print-config"]
        read(snippet, [word for word in [*arguments[1:], *left_out] if word != "..."], capsys)
    elif "pytest" in words[:3]:
        markers = (REPOSITORY / "pyproject.toml").read_text().split("markers = [")[1]
        for previous, word in itertools.pairwise(words):
            if previous == "-m" and word != "pytest":
                named = set(re.findall(r"\w+", word)) - {"and", "or", "not"}
                assert all(f'"{name}:' in markers for name in named), where
            elif word.startswith("tests"):
                assert (REPOSITORY / word).exists(), where
    elif words[:2] == ["python", "-m"] and "." in words[2]:
        source = (REPOSITORY / f"{words[2].replace('.', '/')}.py").read_text()
        for module in re.findall(r"^from (tests[.\w]+) import", source, re.M):  # benchmarks share their arguments
            path = REPOSITORY / f"{module.replace('.', '/')}.py"
            source += path.read_text() if path.is_file() else ""
        for word in words[3:]:
            assert not word.startswith("--") or f'"{word}"' in source, f"{where}: no {word}"
    elif words[0] == "pip":
        project = (REPOSITORY / "pyproject.toml").read_text() + (REPOSITORY / "Makefile").read_text()
        for word in words[2:]:
            if match := re.fullmatch(r"([\w-]+)\[([\w,-]+)\]", word):  # our package with extras
                assert f'name = "{match[1]}"' in project, where
                assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in match[2].split(",")), where
            else:
                assert word.startswith("-") or word in project, where


# ------------------------------------------------------------------------------------------------------------- tests


def choosing_beats_chance(names: dict[str, Any], printed: str) -> None:
    (line,) = printed.splitlines()
    ours, chance = map(float, line.split())
    assert 0 < ours < chance and len(names["chosen"]) == 64


CHECKS: Mapping[str, Callable[[dict[str, Any], str], None]] = {
    "colm = CoLM(": choosing_beats_chance,
    'selection = select("top_k"': lambda names, _: assert_equal(len(names["selection"]), 3),
    "recorder.finish": lambda names, _: assert_equal((len(names["plan"]), len(names["plan"].batches)), (8, 8)),
    "order.search(": lambda names, _: assert_equal(sorted(names["best"]), list(range(8))),
    "CoresetSFTTrainer(": lambda names, _: assert_equal(names["trainer"].state.global_step, 2),
    "group_table(": lambda names, printed: assert_equal("split_sizes (576, 192, 192)" in printed, True),
}
"""Part of a Python block -> what must be true after it."""


def assert_equal(got: object, want: object) -> None:
    assert got == want


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a user's Python shows the warnings of libraries, and goes on
@pytest.mark.parametrize("document", DOCUMENTS)
def test_everything_that_a_document_shows_runs(document, folder, capsys, monkeypatch):
    found = list(snippets(document))
    if not any("demo_data.make ." in s.text for s in found):
        rows_of_the_demo(folder)
    for snippet in found:
        if snippet.kind != "python":
            run_command(snippet, capsys, monkeypatch)
            continue
        names: dict[str, Any] = {"__name__": "__main__"}  # every block stands for itself
        capsys.readouterr()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                exec(compile(snippet.text, str(REPOSITORY / document), "exec"), names)
            except Exception as error:
                raise AssertionError(f"{snippet}: {type(error).__name__}: {error}") from error
        printed = capsys.readouterr().out
        for part, check in CHECKS.items():
            if part in snippet.text:
                check(names, printed)


def test_no_reason_is_left_over():
    commands = [s.text for document in DOCUMENTS for s in snippets(document) if s.kind != "python"]
    blocks = "\n".join((REPOSITORY / document).read_text() for document in DOCUMENTS)
    python = [s.text for document in DOCUMENTS for s in snippets(document) if s.kind == "python"]
    assert len(commands) > 40 and len(python) >= 8
    unused = [p for p in NOT_RUN if not any(re.fullmatch(p, bare(text)) for text in commands)]
    assert not unused, f"nothing is like {unused} any more"
    assert all(beginning in blocks for beginning in (*TEXT_BLOCKS, *SMALLER))
    assert all(any(part in text for text in python) for part in CHECKS)


# ------------------------------------------------------------------------------------------------- tables and lists


def document(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the table under the header row that begins with `heading`."""
    rows = document(name).split(f"| {heading}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names_in(text: str) -> list[str]:
    return re.findall(r"`([a-z][\w-]*)`", text)


def first_cells(name: str, heading: str) -> list[str]:
    return sorted(itertools.chain.from_iterable(names_in(row[0]) for row in table(name, heading)))


def listed(name: str, after: str, until: str = ".") -> list[str]:
    """The names between backticks from `after` to the next `until`."""
    return sorted(names_in(document(name).split(after, 1)[1].split(until, 1)[0]))


def test_the_readme_names_what_there_is():
    import optim

    assert f"one suite of {len(optim.RULES)} optimizers" in document("README.md")
    shown = {s.text.split()[-1] for s in snippets("README.md") if s.text.startswith("datatools ls ")}
    assert shown == set(listing.KINDS)
    assert first_cells("docs/pages/methods/optimizers.md", "update rules") == sorted(optim.RULES)


def test_every_method_has_a_page():
    """Each name that `datatools ls` lists stands in a page of its kind, whose table is made of the same listing."""
    hooks = runpy.run_path(str(REPOSITORY / "docs/hooks.py"))
    pages = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs/pages").rglob("*.md")}
    marked = {kind for text in pages.values() for kind in hooks["MARK"].findall(text)}
    assert marked == set(listing.KINDS) - {"schedules"}
    for kind in marked:
        names = [row[0] for row in listing.rows(kind)]
        assert [re.match(r"\| `([^`]+)`", line)[1] for line in hooks["table"](kind).splitlines()[2:]] == names
    methods = REPOSITORY / "docs/pages/methods"
    for kind in marked - {"formats", "checks"}:
        for name, *_ in listing.rows(kind):
            text = pages[methods / hooks["page_of"](kind, name)]
            assert f"table: {kind} -->" in text or re.search(rf"`([^`]*[ =])?{name}`", text), (kind, name)
            assert re.search("^## What (it|they) comput", text, re.MULTILINE) and re.search(
                r"^## Sources?$", text, re.MULTILINE
            )
    documented = next(text for path, text in pages.items() if path.name == "settings.md")
    assert hooks["SETTINGS"].findall(documented) == list(hooks["MODELS"])
    assert all(hooks["settings"](command).count("\n") > 10 for command in hooks["MODELS"])
    nav = (REPOSITORY / "docs/mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert sorted(re.findall(r": (\S+\.md)", nav)) == sorted(
        str(p.relative_to(REPOSITORY / "docs/pages")) for p in pages
    )


OTHERS = {"tiny.py", "page.py", "digits.py", "spine.py", "approximation.py"}
"""Files of examples/ that are no example, or whose pages `tests/test_example_pages.py` makes on a smaller scale."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", sorted(p.name for p in (REPOSITORY / "examples").glob("*.py") if p.name not in OTHERS)
)
@pytest.mark.filterwarnings("ignore")
def test_examples_run(script, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip() and "nan" not in printed
    assert f"`{script}`" in document("examples/README.md")
    if script == "select_in_memory.py":
        assert printed.startswith("10 of 10")


def test_the_tables_of_the_packages_are_those_of_the_code():
    import optim
    from datatools import AGGREGATIONS, PROJECTORS
    from datatools.order import ESTIMATORS
    from pipelines.diagnose.checks import CHECKS as DIAGNOSES

    assert first_cells("optim/README.md", "name | source") == sorted(optim.RULES)
    schedules = next(row[1] for row in table("optim/README.md", "piece") if "`SCHEDULES`" in row[0])
    assert sorted(names_in(schedules.split(":")[0])) == sorted(optim.SCHEDULES)
    of = {row[0]: row[1] for row in table("datatools/README.md", "file")}
    assert sorted(names_in(of["`projectors/`"])) == sorted(PROJECTORS)
    assert set(AGGREGATIONS) <= set(names_in(of["`less/aggregate.py`"]))
    assert set(ESTIMATORS) <= set(names_in(of["`order/`"]))
    assert set(DIAGNOSES) <= set(names_in(document("docs/pages/methods/diagnose.md")))


@pytest.mark.parametrize("package", ["datatools", "pipelines"])
def test_the_table_of_files_is_whole(package):
    """Every file and folder that it names is there, and every module of the package is in it."""
    told = re.findall(r"`([\w/]+(?:\.py|/))`", "\n".join(row[0] for row in table(f"{package}/README.md", "file")))
    assert all((REPOSITORY / package / name).exists() for name in told)
    ours = {path.name for path in (REPOSITORY / package).glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(ours - set(told)) == []
    rooms = {path.parent.name for path in (REPOSITORY / package).glob("*/__init__.py")}
    assert sorted(rooms - {name.split("/")[0] for name in told}) == []


def test_flags_and_settings_that_are_mentioned_exist(capsys):
    """Spans such as `--on-bad-row` and `--set a.b=c`, which are no commands."""
    from pipelines.cli.commands import COMMANDS

    flags = {"--golden-dir", "--readme", "--rates"}  # of pytest and of scripts in tests/benchmarks
    for command in cli.app.registered_commands:
        flags |= set(re.findall(r"--[a-z][a-z-]*", datatools([str(command.name), "--help"], capsys)[1]))
    roots = [command.settings for command in COMMANDS.values()]

    def there(model: Any, path: list[str]) -> bool:
        field = getattr(model, "model_fields", {}).get(path[0])
        if field is None:
            return False
        inner = [field.annotation, *get_args(field.annotation)]
        free = any(get_origin(one) is dict or one is dict for one in inner)
        return len(path) == 1 or free or any(there(one, path[1:]) for one in inner)

    for name in DOCUMENTS:
        for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", document(name), flags=re.S)):
            words = span.split()
            ours = words[0] in ("datatools", "train", "select", "order") or words[0].startswith("--")
            for word in words if ours else ():
                assert not re.fullmatch(r"--[a-z][a-z-]+", word) or word in flags, f"{name}: `{span}`"
            for _, setting in re.findall(r"--set ('?)([\w.]+)=", span):
                path = setting.removesuffix(".NAME").split(".")
                assert any(there(root, path) for root in roots), f"{name}: no setting {setting}"


def test_links_lead_somewhere():
    for name in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document(name)):
            assert ((REPOSITORY / name).parent / target).exists(), f"{name}: {target}"


NAMED_FILE = re.compile(
    r"(?<![\w/.-])((?:optim|datatools|pipelines|tests|docs|examples)/[\w/.-]*\.(?:py|md|html|json|yaml))"
)
NAMED_MODULE = re.compile(r"`((?:optim|datatools|pipelines)(?:\.[a-z_]\w*)+)")


def test_files_and_modules_that_texts_name_are_there():
    """In documents, docstrings, comments and messages; `NAME.py` stands for a file that a reader would write."""
    sources = [
        path for top in ("optim", "datatools", "pipelines", "examples") for path in (REPOSITORY / top).rglob("*.py")
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in [*sources, *(REPOSITORY / name for name in DOCUMENTS)]}
    found = {(path, name) for path, text in texts.items() for name in NAMED_FILE.findall(text)}
    assert len(found) > 40
    lost = [
        (str(path), name) for path, name in found if not ((REPOSITORY / name).exists() or name.endswith("/NAME.py"))
    ]
    assert lost == []
    modules = {
        (path, name) for path, text in texts.items() for name in NAMED_MODULE.findall(text) if not name.endswith(".py")
    }
    assert len(modules) > 40
    assert [(str(path), name) for path, name in modules if not is_there(name.split("."))] == []


def is_there(parts: list[str]) -> bool:
    """Whether `a.b.c` is a module, or a word of the longest module that it begins with."""
    for end in range(len(parts), 0, -1):
        place = REPOSITORY.joinpath(*parts[:end])
        files = [file for file in (place.with_suffix(".py"), place / "__init__.py", place / "api.py") if file.exists()]
        if files:
            words = "\n".join(file.read_text(encoding="utf-8") for file in files)
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", words) is not None
    return False
