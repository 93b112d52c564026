"""What a user gets wrong, and a full disk: one clear line, the promised exit code, nothing half-written."""

import json
import shutil

import pytest

from datatools import files
from tests.pipelines.conftest import make_world


def complaint(answer, code):
    """The one line of the error."""
    lines = answer.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert answer.code == code, answer.stderr
    assert "Traceback" not in answer.stderr and len(errors) == 1 and lines[-1] == errors[0], answer.stderr
    return errors[0]


def rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ------------------------------------------------------------------------------------------------------------- targets


def test_an_empty_target_file(command, world, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    argv = world.argv("select", out=tmp_path / "run")
    argv[argv.index("--target") + 1] = str(tmp_path / "empty.jsonl")
    assert "empty.jsonl" in complaint(command(*argv), 3)


def test_an_empty_target_file_beside_a_full_one(command, world, tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    argv = [*world.argv("select", out=tmp_path / "run"), "--target", str(tmp_path / "empty.jsonl")]
    assert "empty.jsonl" in complaint(command(*argv), 3)


@pytest.mark.parametrize(
    "row, reason",
    [
        (turns(("user", "only a question")), "no_assistant"),
        (turns(("user", "q"), ("assistant", "")), "empty_answer"),
        (turns(("user", "q"), ("assistant", " \n")), "empty_answer"),
        ({"prompt": "q", "completion": ""}, "empty"),
        ({"question": "q"}, "format"),
    ],
)
def test_a_target_row_without_an_answer(command, world, tmp_path, row, reason):
    """The target says what is wanted: a row of it is never silently left out."""
    path = rows(tmp_path / "t.jsonl", turns(("user", "q"), ("assistant", "a")), row)
    argv = world.argv("select", "--on-bad-row", "skip", out=tmp_path / "run")
    argv[argv.index("--target") + 1] = str(path)
    error = complaint(command(*argv), 3)
    assert "t.jsonl:2" in error, error


def test_a_target_row_cut_before_its_answer(command, world, tmp_path):
    path = rows(tmp_path / "t.jsonl", turns(("user", "long " * 50), ("assistant", "a")))
    argv = world.argv("select", "--max-length", 64, out=tmp_path / "run")
    argv[argv.index("--target") + 1] = str(path)
    assert "no_supervised_token" in complaint(command(*argv), 3)


def test_a_model_without_a_chat_template(command, tmp_path):
    """Conversations need one; it is never guessed. With --chat-template tulu the same command runs."""
    world = make_world(tmp_path / "world")
    (world.model / "chat_template.jinja").unlink()
    error = complaint(command(*world.argv("select", out=tmp_path / "run")), 3)
    assert "chat template" in error and "--chat-template" in error
    answer = command(*world.argv("select", "--method", "random", "--chat-template", "tulu", out=tmp_path / "tulu"))
    assert answer.code == 0, answer.stderr


# --------------------------------------------------------------------------------------------------- budgets and names


@pytest.mark.parametrize(
    "budget, text",
    [
        ("150%", "at most 100%"),
        ("0%", "above 0%"),
        ("0.05", "ambiguous: a share or a number? Write '5%'"),
        ("61", "exceeds the 60 eligible of 60 rows"),
        ("many", "cannot parse budget"),
        ("1 token", "the shortest has"),
        ("-5", "cannot parse budget"),
    ],
)
def test_impossible_budgets(command, world, tmp_path, budget, text):
    """Refused before the warm-up, so that a slip costs seconds."""
    argv = world.argv("select", "--budget", budget, out=tmp_path / "run")
    assert text in complaint(command(*argv), 2)
    assert not list(tmp_path.glob("run/warmup"))


@pytest.mark.parametrize(
    "more, text",
    [
        (["--method", "lesss"], "did you mean 'less'"),
        (["--optimizer", "adamv"], "did you mean 'adam' or 'adamw'"),
        (["--projector", "sjtl"], "did you mean 'sjlt'"),
        (["--set", "aggregate=mea"], "did you mean 'mean'"),
        (["--set", "features.method=hook"], "did you mean 'hooks'"),
        (["--set", "warmup.schedule=linea"], "did you mean 'linear'"),
        (["--set", "warmup.fracton=0.1"], "did you mean 'fraction'"),
        (["--adam-mode", "papr"], "did you mean 'paper'"),
        (["--on-bad-row", "skp"], "did you mean 'skip'"),
        (["--max-per-source", "-1"], "max_per_source"),
        (["--set", "warmup.optimizer_options={beta: 1}"], "did you mean 'betas'"),
    ],
)
def test_unknown_names(command, world, tmp_path, more, text):
    """Refused before anything is read or written."""
    assert text in complaint(command(*world.argv("select", *more, out=tmp_path / "run")), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option, value, code",
    [
        ("--train", "missing.jsonl", 3),
        ("--target", "missing.jsonl", 3),
        ("--model", "./missing", 2),
        ("--checkpoints", "missing", 2),
        ("--chat-template", "missing.jinja", 2),
        ("--config", "missing.yaml", 2),
    ],
)
def test_files_that_are_not_there(command, world, tmp_path, option, value, code):
    """The message names what was asked for."""
    argv = world.argv("select", out=tmp_path / "run")
    if option in argv:
        argv[argv.index(option) + 1] = value
    else:
        argv += [option, value]
    error = complaint(command(*argv, cwd=str(tmp_path)), code)
    assert value.removeprefix("./") in error


def test_other_commands_complain_alike(command, world, tmp_path):
    empty = rows(tmp_path / "empty.jsonl")
    train = world.argv("train", out=tmp_path / "train")
    train[train.index("--data") + 1] = str(empty)
    assert "empty.jsonl" in complaint(command(*train), 3)
    assert "did you mean 'adamw'" in complaint(
        command(*world.argv("train", "--optimizer", "adamww", out=tmp_path / "train")), 2
    )
    evaluate = ["evaluate", "--model", world.model, "--data", world.pool]
    assert "adapter_config.json is missing" in complaint(command(*evaluate, "--adapter", tmp_path), 3)
    assert "missing.jsonl" in complaint(command(*evaluate[:-1], "missing.jsonl"), 3)
    audit = ["audit", "--selected", tmp_path / "selected.jsonl", "--pool", world.pool, "--test", world.test]
    assert "selected.jsonl" in complaint(command(*audit, "--model", world.model, "--out", tmp_path / "audit"), 2)
    assert "FILE:LINE" in complaint(command("explain", tmp_path / "selected.jsonl"), 2)
    assert "no such file" in complaint(command("explain", f"{tmp_path / 'selected.jsonl'}:1"), 2)


def test_a_model_that_is_broken(command, world, tmp_path):
    """Weights that are not numbers: the warm-up stops at once instead of selecting by noise."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(world.model, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    argv = world.argv("select", out=tmp_path / "run")
    argv[argv.index("--model") + 1] = str(broken)
    assert "the loss of step 1 is nan" in complaint(command(*argv), 3)


# ----------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture(scope="module")
def whole(command, world, tmp_path_factory):
    """A run without trouble, to compare with and to learn the sizes of its files from."""
    run = tmp_path_factory.mktemp("whole") / "run"
    answer = command(*world.argv("select", "--dim", 4096, out=run))
    assert answer.code == 0, answer.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "features/train-4/part-00000.safetensors",
        "features/target-8/part-00000.safetensors",
        "warmup/checkpoint-4/optimizer.pt",
        "warmup/checkpoint-4/adapter_model.safetensors",
        "warmup/checkpoint-4/complete.json",
        "report.html",
        "scores.parquet",
        "run.yaml",
    ],
)
def test_a_full_disk_stops_with_one_line_and_the_run_goes_on(command, world, whole, tmp_path, name):
    """No file may reach the size that this one has: exit code 4, and with space again the same result to the byte."""
    run = tmp_path / "run"
    argv = world.argv("select", "--dim", 4096, out=run)
    answer = command(*argv, file_limit=(whole / name).stat().st_size - 1)
    error = complaint(answer, 4)
    assert "space" in error or "disk" in error
    if run.exists():
        assert not list(run.rglob(".tmp*")) and not (run / ".lock").exists()
    answer = command(*argv)
    assert answer.code == 0, answer.stderr
    for path in sorted([*whole.glob("features/*/*"), whole / "selected.jsonl", whole / "scores.parquet"]):
        assert files.digest_file(run / path.relative_to(whole)) == files.digest_file(path), path
