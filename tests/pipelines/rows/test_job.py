"""An index has the same bytes whoever makes it, and only what is missing is made."""

import json
import os
import time

from pipelines.rows import ranges
from pipelines.rows.job import Job
from pipelines.rows.jsonl import Limits
from pipelines.rows.options import Options
from pipelines.rows.read import index_rows
from pipelines.runs import workers
from tests.pipelines.rows.families import encoder

OPTIONS = Options("dataset", {}, False, None, Limits())


def index(path, cache, processes=1):
    found = index_rows(
        [path], OPTIONS, cache=cache, encoder=encoder("chatml", 40), label="pool", workers=processes,
        on_bad_row="skip",
    )  # fmt: skip
    parts = {file.name: file.read_bytes() for file in (cache / "index-pool").glob("*.arrow")}
    return found, parts


def told(found):
    pool, scan = found.pool, found.scan
    rows = [(row.id, row.source, row.line, row.raw) for row in pool]
    tokens = [found.tokens.row(i) for i in range(len(pool))]
    return (
        rows,
        list(scan.keys),
        scan.tokens.tolist(),
        list(map(str, found.bad)),
        scan.bad,
        tokens,
        pool.flags,
        pool.files,
    )


def test_workers_ranges_and_growth(tmp_path, monkeypatch):
    lines = [json.dumps({"prompt": f"Question {i}?", "completion": "word " * (i % 7 + 1), "id": f"i{i % 50}"})
             for i in range(60)]  # fmt: skip
    lines[7], lines[30] = "{", ""
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(lines))
    whole, one = index(path, tmp_path / "a")
    monkeypatch.setattr(ranges, "BYTES", 700)
    cut, alone = index(path, tmp_path / "b")
    several, together = index(path, tmp_path / "c", processes=2)
    assert len(one) == 2 and len(alone) > 8 and alone == together
    assert told(whole) == told(cut) == told(several)
    with workers.acting_as(workers.Member("second", 1, 2, leads=False)):
        of_a_team, theirs = index(path, tmp_path / "e")
    assert theirs == alone and told(of_a_team) == told(cut)
    path.write_text("\n".join([*lines, lines[0]]) + "\n")
    grown, more = index(path, tmp_path / "b")
    assert len(grown.pool) == len(cut.pool) + 1 and len(alone.keys() & more.keys()) >= len(alone) - 4
    assert grown.pool.ids[-1] == "i0#3" and told(grown) == told(index(path, tmp_path / "d")[0])


def test_members_share_the_parts(tmp_path, monkeypatch):
    """Two members that begin together make each part once; one that comes alone makes all of them."""
    monkeypatch.setattr(ranges, "BYTES", 200)
    path, made = tmp_path / "pool.jsonl", tmp_path / "made"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?", "completion": "word"}) + "\n" for i in range(60)))
    _, alone = index(path, tmp_path / "alone")
    make = Job.make

    def noted(job, number):
        with open(made, "a") as file:
            file.write(f"{os.getpid()} {number}\n")
        time.sleep(0.02)
        return make(job, number)

    monkeypatch.setattr(Job, "make", noted)

    def help_with(place):
        with workers.acting_as(workers.Member(f"{place}", place, 2, leads=place == 0)):
            return index(path, tmp_path / "cache")[1]

    if not (child := os.fork()):
        os._exit(help_with(1) != alone)
    parts = help_with(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and parts == alone
    makers, numbers = zip(*(line.split() for line in made.read_text().splitlines()), strict=True)
    assert len(set(makers)) == 2 and sorted(map(int, numbers)) == list(range(len(alone) // 2)) and len(alone) > 20


def test_rows_that_could_not_be_copied_reach_the_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "BYTES", 200)
    rows = [json.dumps({"prompt": f"Question {i}?", "completion": "word"}) for i in range(8)]
    path = tmp_path / "pool.json"
    path.write_text(f"[{', '.join([*rows[:3], '', *rows[3:]])}]")
    found, _ = index(path, tmp_path / "cache", processes=2)
    assert len(found.pool) == 8 and [(bad.line, bad.reason) for bad in found.bad] == [(4, "invalid_json")]
