"""Run fixed commands with any version of the code, and compare what two versions wrote, file by file.

    python -m tests.same_outputs --code /path/to/before --out before
    python -m tests.same_outputs --out after                 # the code of this checkout
    python -m tests.same_outputs compare before after        # exit code 1 if a result differs

The inputs (a tiny model, made-up rows) come from this checkout for both sides, and every command is a process of its
own, with one thread, that finds the code under test first on its path. Every command runs in the folder --out and names
its files relative to it, so that two folders can be compared. `--only WORDS` runs the commands whose name contains one
of the comma-separated words (and what they need), on both sides alike.

A file is `identical`; or the `same` apart from what may differ between two runs of the same code (RULES); or it shows
the same numbers in other `words` (READ_BY_PEOPLE, SENTENCE); or it is `different`. Stores, weights, orders and tables
are compared by their bytes, with no rule.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

SMALL = "--set warmup.minimum_rows=16 --epochs 2 --batch-size 4 --dim 256 --lora-rank 4"
SELECT = "select --model world/model --train world/pool.jsonl --target world/target.jsonl --budget 20%"
TRAIN = "train --model world/model --data world/few.jsonl"


@dataclass(frozen=True)
class Command:
    """One command line; `code` is the exit code it has to end with, `needs` names the commands it builds on."""

    name: str
    line: str
    needs: tuple[str, ...] = ()
    code: int = 0


COMMANDS = (
    Command("select-less", f"{SELECT} {SMALL} --method less --max-per-source 0.5 --out select-less"),
    Command("select-rds", f"{SELECT} --method rds --out select-rds"),
    Command("select-tfidf", f"{SELECT} --method tfidf --max-per-source 5 --out select-tfidf"),
    Command("select-loss", f"{SELECT} --method loss --budget '700 tokens' --out select-loss"),
    Command(
        "select-dirty",
        "select --model world/model --train world/dirty.jsonl --target world/target.jsonl --method random-length "
        "--on-bad-row quarantine --dedup near --preference chosen --budget 8 --max-length 96 --out select-dirty",
    ),
    Command(
        "train",
        f"{TRAIN} --lora-rank 0 --optimizer muon --schedule cosine --epochs 2 --batch-size 4 --eval-every 4 "
        "--eval-data world/test.jsonl --set save_steps=4 --out train",
    ),
    Command(
        "train-coreset",
        f"{TRAIN} --lora-rank 4 --epochs 1 --coreset colm --large-batch 8 --keep 4 --out train-coreset",
    ),
    Command(
        "order-validate",
        "order validate --model world/model --data world/few.jsonl --batches 4 --orders 3 --warmup-steps 2 "
        "--estimators pairwise,reduced,table --batch-size 4 --lora-rank 4 --out order",
    ),
    Command("order-search", "order search --out order", ("order-validate",)),
    Command(
        "train-order",
        f"{TRAIN} --order order/order.npz --lora-rank 4 --batch-size 4 --out train-order",
        ("order-search",),
    ),
    Command(
        "audit",
        "audit --selected select-less/selected.jsonl --pool world/pool.jsonl --test world/test.jsonl "
        "--against random,tfidf --seeds 2 --epochs 1",
        ("select-less",),
    ),
    Command("diagnose", "diagnose --model world/model --data world/few.jsonl --rows 4 --out diagnose"),
    # What they print is all they leave; quick.
    Command(
        "evaluate",
        "evaluate --model world/model --adapter train-coreset/adapter --data world/test.jsonl",
        ("train-coreset",),
    ),
    Command("explain", "explain select-less/selected.jsonl:1", ("select-less",)),
    Command("report", "report select-less", ("select-less", "audit")),
    Command("ls", "ls methods"),
    Command("settings-select", f"{SELECT} {SMALL} --print-config"),
    Command("settings-train", f"{TRAIN} --coreset colm --print-config"),
    Command("settings-order", "order search --model world/model --data world/few.jsonl --print-config"),
    # Refused before anything is loaded; quick.
    Command("refused-setting", f"{TRAIN} --set training.lerning_rate=1 --out new", code=2),
    Command("refused-flag", f"{TRAIN} --budget 5% --out new", code=2),
    Command("refused-file", "select --model world/model --train world/none.jsonl --method random --out new", code=3),
    Command("refused-folder", f"{TRAIN} --out world", code=2),
    Command("refused-run", f"{TRAIN} --out select-rds", ("select-rds",), code=2),
    Command("refused-seed", f"{SELECT} --method rds --seed 7 --out select-rds", ("select-rds",), code=2),
    Command(
        "refused-audit",
        "audit --selected select-rds/selected.jsonl --test world/test.jsonl --out select-less",
        ("select-rds", "select-less"),
        code=2,
    ),
)
"""Twelve that compute, then seven that show, and seven that are refused."""


def make_world(folder: Path) -> None:
    """A tiny model and its rows, the same bytes on every side; nothing of the code under test is imported."""
    from tests.tiny import save_tiny_model, write_rows

    folder.mkdir(parents=True)
    save_tiny_model(folder / "model")
    write_rows(folder / "pool.jsonl", 60)
    write_rows(folder / "few.jsonl", 32)
    write_rows(folder / "target.jsonl", 3, source="t", start=500)
    write_rows(folder / "test.jsonl", 6, source="u", start=700)
    (folder / "dirty.jsonl").write_bytes(dirty_rows())


def dirty_rows() -> bytes:
    """Rows in every format, repeated, nearly repeated, cut short, broken and hostile."""
    long = " ".join(f"word{i * i % 89}" for i in range(60))
    rows: list[Any] = [
        {"prompt": "2 + 2 =", "completion": "4", "id": "p"},
        {"instruction": "Add.", "input": "2 2", "output": "4", "id": 7},
        {"question": "How many?", "answer": "Eleven.", "id": "q"},
        {"prompt": "Which?", "chosen": "This one.", "rejected": "That one."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"text": "Once upon a time there was a row."},
        {"text": long},
        {"text": long + " end"},
        {"text": "Once upon a time there was a row."},
        {
            "messages": [
                {"role": "user", "content": "<b>&amp;</b>"},
                {"role": "assistant", "content": "=1+1\u202e\u0007"},
            ]
        },
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"messages": []},
        {"messages": "not a list"},
        {"prompt": "empty answer", "completion": ""},
        {"unknown": 1},
        {"dataset": "../../etc", "prompt": "a path?", "completion": "a path."},
        {"prompt": "long " * 60, "completion": "late"},
        [1, 2, 3],
        None,
    ]
    rows += [
        {"prompt": f"number {i}", "completion": f"{i * 37 % 101} is it", "dataset": f"d{i % 2}"} for i in range(12)
    ]
    lines = [json.dumps(row, ensure_ascii=bool(i % 2)).encode() for i, row in enumerate(rows)]
    lines += [b'{"prompt": "cut', b"", b"   ", b'{"prompt": "\xff\xfe", "completion": "bytes"}', b'{"text": NaN}']
    return b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n"


def environment(code: Path) -> dict[str, str]:
    """One thread, no network, a fixed width of the terminal, and `code` before everything else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DATATOOLS", "COLUMNS", "LC_", "LANG"))}
    fixed = {
        "PYTHONPATH": str(code),
        "PYTHONSAFEPATH": "1",  # not the current folder
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
    }
    return kept | fixed


def chosen(words: str) -> Iterator[Command]:
    """The commands whose name contains one of the words, and those they build on, in their order."""
    wanted = {c.name for c in COMMANDS if any(word in c.name for word in words.split(","))}
    while more := {need for c in COMMANDS if c.name in wanted for need in c.needs} - wanted:
        wanted |= more
    return (c for c in COMMANDS if c.name in wanted)


def run(code: Path, out: Path, only: str = "") -> int:
    """Run the commands with the code of the checkout `code` in the new folder `out`; 1 if one ended wrongly."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    make_world(out / "world")
    (out / "shown").mkdir()
    failed = []
    for command in chosen(only):
        begun = time.monotonic()
        argv = [sys.executable, "-m", "pipelines", *shlex.split(command.line)]
        done = subprocess.run(argv, cwd=out, env=environment(code), capture_output=True, stdin=subprocess.DEVNULL)
        (out / "shown" / f"{command.name}.out").write_bytes(done.stdout)
        (out / "shown" / f"{command.name}.err").write_bytes(done.stderr)
        wrong = "" if done.returncode == command.code else f"  exit code {done.returncode}, not {command.code}"
        print(f"{command.name:16s} {time.monotonic() - begun:6.1f} s{wrong}", flush=True)
        if wrong:
            failed.append(command.name)
            print(done.stderr.decode("utf-8", "replace"))
    return 1 if failed else 0


@dataclass(frozen=True)
class Rule:
    """What may differ between two runs of the same code, and why.

    Attributes:
        files: a regular expression for the files (paths below the folder) that the rule is for.
        keys: JSON and YAML leaves under a key that matches are left out.
        text: in text, every match is replaced by `<name>`.
    """

    name: str
    reason: str
    files: str = ""
    keys: str = ""
    text: str = ""


RULES = (
    Rule(
        "when",
        "the clock",
        keys="time|created|updated",
        text=r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00| UTC)?|\d+ [A-Z][a-z]+ \d{4}, \d\d:\d\d UTC",
    ),
    Rule(
        "took",
        "how long something took on this machine, and what is estimated from that",
        keys=r"seconds|\w+_seconds|seconds_(an?|per)_\w+|spent|tokens_per_second|select_share",
        text=r"\b[\d.,]+\s?(ms|s|min|h|[a-z ]+/s|(a|per) second)\b(\s[\d.]+\s(s|min)\b)?|"
        r"[\d.]+\s?%(?= of (a|the|each) step)|stage, [^<]{1,40}\s%(?= of the time)",
    ),
    Rule(
        "took",
        "charts of the speed of training and of the stages of a run; columns of times and rates in tables",
        r"/report\.html$",
        text=r"<section><h2>(Tokens per second|[^<]*time spent choosing)</h2>(?s:.*?)</section>|"
        r'(?<=<td class="n">)[\d,]+(?=</td><td class="n">\d+ of \d+</td>)|'
        r"left:[\d.]+%;width:[\d.]+%|(?<=<tr><th>Time</th>)<td.*?(?=</tr>)",
    ),
    Rule(
        "memory",
        "what the process held at that moment",
        keys="peak_bytes|peak_rss_bytes|memory_bytes",
        text=r"\b[\d.,]+\s[kMG]B(?= (of )?memory)|(?<=memory</th>)<td.*?(?=</tr>)",
    ),
    Rule("code", "the commit and the digest of the code itself", r"/provenance\.json$", "git_commit|code"),
    Rule("versions", "of libraries, where two environments are compared", r"/provenance\.json$", "versions"),
    Rule(
        "digests",
        "of files that hold one of the above; every file is compared by itself",
        r"/provenance\.json$",
        "outputs",
    ),
    Rule("digests", "the same", r"/complete\.json$", r"trainer_state\.json|training_args\.bin"),
    Rule("digests", "of a line or of the same file with one of the above", keys="sum|seal"),
)
"""With no rule for .safetensors, .npz, .npy, .parquet, .pt and the like: those are compared by their bytes."""

READ_BY_PEOPLE = re.compile(r"\.(out|err|html|md)$")
"""Files that may say the same numbers in other words."""

SENTENCE = re.compile(r"\.(detail|warnings?|sentence|notes?|title|description|formula\.text)(\.\d+)?$")
"""JSON leaves that are sentences for people: the same."""

SETTINGS = re.compile(r"(run\.yaml|shown/settings-\w+\.out)$")
"""Files of settings: the second side may have a setting that the first does not know, as long as it is null."""


def applied(kind: str, name: str) -> list[tuple[str, re.Pattern[str]]]:
    """The rules' `kind` (keys or text) for the file `name`, each with its rule's name."""
    return [
        (rule.name, re.compile(getattr(rule, kind)))
        for rule in RULES
        if getattr(rule, kind) and re.search(rule.files, name)
    ]


def leaves(value: Any, keys: Sequence[tuple[str, re.Pattern[str]]], at: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value by path, those that may differ left out."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not any(pattern.fullmatch(str(key)) for _, pattern in keys):
                yield from leaves(inner, keys, f"{at}.{key}")
    else:
        yield at, value


def structured(name: str, data: bytes) -> Any:
    """The value in a JSON, JSON lines or YAML file; None for other files and broken ones."""
    try:
        if name.endswith("/seals.jsonl"):  # a journal in the order of writing: which files it seals
            return sorted({json.loads(line).get("name", "") for line in data.splitlines()})
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in data.splitlines()]
        if name.endswith(".json"):
            return json.loads(data)
        if name.endswith(".yaml") or re.search(r"shown/settings-\w+\.out$", name):
            import yaml

            return yaml.safe_load(data)
    except ValueError:
        pass
    return None


def compare_values(name: str, a: Any, b: Any) -> tuple[str, str]:
    """`same`, `words` or `different`, and the first leaf that differs."""
    keys = applied("keys", name)
    left, right = dict(leaves(a, keys)), dict(leaves(b, keys))
    settings = SETTINGS.search(name) is not None
    found: dict[str, str] = {}
    for key in {**left, **right}:
        if key in left and key in right:
            before, after = left[key], right[key]
            if repr(before) != repr(after):
                found[key] = "words" if SENTENCE.search(key) and _only_words(before, after) else "different"
        elif not (settings and key not in left and right[key] is None):  # a setting that is new, and not set
            found[key] = "different"
    if not found:
        return "same", ""
    kind = "different" if "different" in found.values() else "words"
    first = next(key for key in found if found[key] == kind)
    shown = [repr(side[first])[:200] if first in side else "nothing" for side in (left, right)]
    return kind, f"{len(found)} of {len(left)} values: {first}: {shown[0]} != {shown[1]}"


def _only_words(a: Any, b: Any) -> bool:
    """Whether two texts say the same numbers, in any order."""
    return isinstance(a, str) and isinstance(b, str) and _numbers(a) == _numbers(b)


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d[\d.,]*", text))


def plain(name: str, text: str) -> list[str]:
    """The lines of a text with what may differ replaced, and without the spaces that only align them."""
    for rule, pattern in applied("text", name):
        text = pattern.sub(f"<{rule}>", text)
    return [" ".join(line.split()) for line in re.split(r"[\r\n]+", text) if line.strip()]


def compare_texts(name: str, a: str, b: str) -> tuple[str, str]:
    """`same`, `words` (the same numbers) or `different`, and the first line that differs."""
    left, right = plain(name, a), plain(name, b)
    if left == right:
        return "same", ""
    at = _first(left, right)
    x, y = "".join(left[at : at + 1]), "".join(right[at : at + 1])
    start = max(0, _first(x, y) - 60)
    first = f"line {at + 1}: {x[start : start + 160]!r} != {y[start : start + 160]!r}"
    return ("words" if _only_words("\n".join(left), "\n".join(right)) else "different"), first


def _first(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The first place where two sequences differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def arrays(path: Path) -> Mapping[str, Any]:
    """The named arrays or columns of a file, to say which of them differs; nothing for other files."""
    import numpy as np

    if path.suffix in (".npz", ".npy"):
        loaded = np.load(path)
        return {"": loaded} if path.suffix == ".npy" else {key: loaded[key] for key in loaded.files}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {key: tensor.float().numpy() for key, tensor in load_file(path).items()}
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return {key: np.array(column) for key, column in parquet.read_table(path).to_pydict().items()}
    return {}


def compare_bytes(a: Path, b: Path) -> str:
    """Where two files differ: an array, a column, or a byte."""
    try:
        left, right = arrays(a), arrays(b)
    except Exception as error:  # a file that cannot be read differs all the same
        return f"cannot be read: {error}"
    for key in {**left, **right}:
        if key not in left or key not in right:
            return f"array {key!r} is only in {a if key in left else b}"
        x, y = left[key], right[key]
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"array {key!r}: {x.dtype}{list(x.shape)} != {y.dtype}{list(y.shape)}"
        if x.tobytes() != y.tobytes():
            apart = f", by up to {abs(x.astype(float) - y.astype(float)).max():.3g}" if x.dtype.kind in "fiu" else ""
            return f"array {key!r} of {len(left)}: {int((x != y).sum())} of {x.size} entries{apart}"
    x, y = a.read_bytes(), b.read_bytes()
    return f"byte {_first(x, y)} of {len(x)} and {len(y)}" + (
        ": the arrays are equal, what describes them is not" if left else ""
    )


CACHED = re.compile(r"(tokens|rows)-[\w-]+\.(bin|arrow)")
"""Files that save work and hold no result: their names follow the code that made them."""


def compare_files(name: str, a: Path, b: Path) -> tuple[str, str]:
    """`identical`, `same`, `words` or `different`, and where."""
    left, right = a.read_bytes(), b.read_bytes()
    if left == right:
        return "identical", ""
    values = structured(name, left), structured(name, right)
    if None not in values:
        kind, where = compare_values(name, *values)
        commented = name.startswith("shown/") and kind == "same"
        return ("words", "comments") if commented else (kind, where)
    if READ_BY_PEOPLE.search(name) or Path(name).suffix in (".json", ".jsonl", ".yaml", ".jinja"):
        kind, where = compare_texts(name, left.decode("utf-8", "replace"), right.decode("utf-8", "replace"))
        return ("different" if kind == "words" and not READ_BY_PEOPLE.search(name) else kind), where
    return "different", compare_bytes(a, b)


def compare(a: Path, b: Path, verbose: bool = False) -> int:
    """Print how the files of two folders differ; 1 if a result does."""
    sides = [
        {str(p.relative_to(side)): p for p in side.rglob("*") if p.is_file() and not CACHED.fullmatch(p.name)}
        for side in (a, b)
    ]
    found: Counter[str] = Counter()
    for name in sorted({**sides[0], **sides[1]}):
        if name in sides[0] and name in sides[1]:
            kind, where = compare_files(name, sides[0][name], sides[1][name])
        else:
            kind, where = "different", f"only in {a if name in sides[0] else b}"
        found[kind] += 1
        if kind == "different" or verbose or kind == "words":
            print(f"{kind:10s} {name}{': ' if where else ''}{where}")
    print(
        f"{found.total()} files: {found['identical']} identical, {found['same']} the same apart from "
        f"{', '.join(dict.fromkeys(rule.name for rule in RULES))}, {found['words']} with the same numbers in "
        f"other words, {found['different']} different"
    )
    return 1 if found["different"] or not found else 0


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if words[:1] == ["compare"]:
        parser.add_argument("a", type=Path)
        parser.add_argument("b", type=Path)
        parser.add_argument("--verbose", action="store_true", help="name every file")
        given = parser.parse_args(words[1:])
        return compare(given.a, given.b, given.verbose)
    parser.add_argument("--code", type=Path, default=REPOSITORY, help="a checkout [default: this one]")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--only", default="", metavar="WORDS", help="commands whose name contains one of these")
    given = parser.parse_args(words)
    return run(given.code.resolve(), given.out.resolve(), given.only)


if __name__ == "__main__":
    sys.exit(main())
