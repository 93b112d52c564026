"""Validation while a model trains, trackers, and reports that are drawn last."""

import json
import shutil
import struct
import sys
from types import ModuleType

import pytest

from datatools import DataError, EnvironmentProblem, UsageError
from pipelines.report import pages
from pipelines.report import training_page as training_report
from pipelines.rows import preflight
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.training import checkpoint_files, evaluation, train, trainer, validation
from pipelines.training import fit as fit_module


def settings(world, out, **changes):
    """A run of 6 steps, 3 an epoch, evaluated after every second."""
    values = {
        "model": ModelConfig(name=str(world.model)),
        "data": DataConfig(paths=[str(world.folder / "few.jsonl")]),
        "out": out,
        "lora": LoraConfig(rank=4, dropout=0.1),
        "training": TrainingConfig(epochs=2, batch_size=8, micro_tokens=4096, learning_rate=0.03),
        "eval_data": [str(world.test)],
        "eval_every": 2,
    }
    return TrainConfig(**values | changes)


@pytest.fixture
def script(monkeypatch):
    """`script([3, 1, 2])`: the validation losses by evaluation; `stop`: the evaluation after that step never comes."""
    inner = trainer.DataTrainer.evaluate

    def arrange(losses, stop=None):
        def evaluate(self, *args, **kwargs):
            if self.state.global_step == stop:
                raise KeyboardInterrupt
            self.validate = lambda model: {"eval_loss": float(losses[(self.state.global_step + 1) // 2 - 1])}
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(trainer.DataTrainer, "evaluate", evaluate)

    return arrange


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluated(run):
    return {entry["step"]: entry["eval_loss"] for entry in metrics(run) if "eval_loss" in entry}


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def saved(run):
    return sorted(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*"))


def test_the_loss_is_that_of_evaluate_and_training_is_not_touched(world, tmp_path):
    """With dropout: an evaluation in between draws no random number."""
    run = train.run(settings(world, tmp_path / "run"))
    plain = train.run(settings(world, tmp_path / "plain", eval_data=[], eval_every=None))
    assert list(evaluated(run)) == [2, 4, 6]
    assert [e["loss"] for e in metrics(run)] == [e["loss"] for e in metrics(plain)]
    model = ModelConfig(name=str(world.model), adapter=run / "adapter")
    after = evaluation.evaluate(EvaluateConfig(model=model, data=DataConfig(paths=[str(world.test)])))
    assert min(evaluated(run).values()) == pytest.approx(after["loss"], abs=1e-5)
    assert all(entry["grad_norm"] > 0 and entry["tokens_per_second"] > 0 for entry in metrics(run))
    page = (run / "report.html").read_text()
    assert "validation rows" in page and "Gradient norm" in page and "Tokens per second" in page
    (run / "report.html").unlink()
    assert pages.draw(run).read_text() == page, "equal inputs, equal bytes"


def test_the_best_is_kept_and_saved(world, tmp_path, script):
    script([3, 1, 2])
    run = train.run(settings(world, tmp_path / "run"))
    assert saved(run) == [3, 4, 6], "each epoch's, and the best; the first best is gone"
    assert weights(run / "adapter") == weights(run / "checkpoints" / "checkpoint-4")
    facts = json.loads((run / "training.json").read_text())
    assert facts["validation"]["best_step"] == 4 and "after step 4: 1" in (run / "report.html").read_text()
    last = train.run(settings(world, tmp_path / "last", keep_best=False))
    assert weights(last / "adapter") == weights(last / "checkpoints" / "checkpoint-6") and saved(last) == [3, 6]


def test_training_stops_when_nothing_gets_better_and_a_restart_does_not_go_on(world, tmp_path, script, capsys):
    script([1, 2, 3])
    run = train.run(settings(world, tmp_path / "run", patience=1))
    assert list(evaluated(run)) == [2, 4] and "stopped early, after step 4" in capsys.readouterr().err
    want = weights(run / "adapter")
    assert want == weights(run / "checkpoints" / "checkpoint-2")
    for every in (None, 4):  # killed before the result was saved: at the last checkpoint, or at that of the stop
        again = shutil.copytree(run, tmp_path / f"again-{every}")
        shutil.rmtree(again / "adapter")
        train.run(settings(world, again, patience=1))
        assert weights(again / "adapter") == want and list(evaluated(again)) == [2, 4]


@pytest.mark.parametrize("losses", [[3, 1, 2], [1, 2, 3], [3, 2, 1]])
def test_a_run_interrupted_at_any_evaluation_ends_with_the_same_bytes(world, tmp_path, script, losses):
    script(losses)
    whole = train.run(settings(world, tmp_path / "whole"))
    for stop in (4, 6):
        script(losses, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings(world, tmp_path / "run"))
    script(losses)
    run = train.run(settings(world, tmp_path / "run"))
    assert weights(run / "adapter") == weights(whole / "adapter")
    assert saved(run) == saved(whole) and evaluated(run) == evaluated(whole)
    assert [e["loss"] for e in metrics(run)] == [e["loss"] for e in metrics(whole)]


MOMENTS = [
    ("pipelines.training.evaluation:token_losses", 3, "after"),  # in the midst of one
    ("pipelines.training.trainer:mark_complete", 2, "before"),  # decided, and not saved
    ("pipelines.training.validation:Validate.on_save", 3, "before"),  # the former best is not removed
]


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_validation_ends_with_the_same_bytes(command, world, tmp_path):
    """By SIGKILL, so that nothing is put in order."""
    flags = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "0.03", "--lora-rank", "4", "--eval-every", "2"]
    start = ["train", "--model", str(world.model), "--data", str(world.folder / "few.jsonl"), "--set", "save_steps=4"]
    argv = [*start, *flags, "--eval-data", str(world.test), "--set", "lora.dropout=0.1", "--out"]

    def found(run):
        parts = {path.name: path.read_bytes() for path in (run / "adapter").iterdir() if path.suffix != ".md"}
        facts = json.loads((run / "training.json").read_text())["validation"]
        return (
            parts | {"saved": saved(run), "losses": [e["loss"] for e in metrics(run)], "said": evaluated(run)} | facts
        )

    assert command(*argv, tmp_path / "whole").code == 0
    want = found(tmp_path / "whole")
    for number, moment in enumerate(MOMENTS):
        assert command(*argv, tmp_path / f"run-{number}", die=list(moment)).code == -9, moment
        assert command(*argv, tmp_path / f"run-{number}").code == 0
        assert found(tmp_path / f"run-{number}") == want, moment


def test_a_best_checkpoint_that_is_gone_is_made_again(world, tmp_path, script):
    script([3, 1, 2])
    run = train.run(settings(world, tmp_path / "run"))
    want = weights(run / "adapter")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    train.run(settings(world, run))
    assert weights(run / "adapter") == want


def test_losses_that_are_not_finite_are_never_the_best(world, tmp_path, script, capsys):
    script([2, float("nan"), 3])
    run = train.run(settings(world, tmp_path / "run"))
    assert evaluated(run) == {2: 2, 4: None, 6: 3} and "it cannot be the best" in capsys.readouterr().err
    assert json.loads((run / "training.json").read_text())["validation"]["best_step"] == 2


def test_the_history_says_what_is_over():
    nan = float("nan")
    for losses, patience, expected in (
        ([3, 2, 1], 1, False), ([1, 2], 1, True), ([1, 2], 2, False), ([1, 2, 1], 2, True), ([1, 2, 0.5], 2, False),
        ([nan, nan], 1, True), ([1, nan], 1, True), ([1, 2, 3], None, False), ([1], 1, False),
    ):  # fmt: skip
        assert validation.over(list(enumerate(losses)), patience) is expected, (losses, patience)


def test_rows_that_are_trained_on_are_named(world, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text("".join((world.folder / "few.jsonl").read_text().splitlines(True)[:2]))
    run = train.run(settings(world, tmp_path / "run", eval_data=[str(tmp_path / "mine.jsonl")], eval_every=None))
    said = capsys.readouterr().err
    assert "2 of 2 validation rows are also in the training data" in said and "be too low" in said
    assert "2 of 2 validation rows" in (run / "report.html").read_text()


def test_settings_without_rows_and_trackers_that_are_not_installed_are_refused_early(world, tmp_path, monkeypatch):
    for change, text in (({"eval_every": 3}, "--eval-every 3"), ({"patience": 2}, "--patience 2")):
        with pytest.raises(UsageError, match=f"{text}: .*--eval-data"):
            preflight.check(settings(world, tmp_path, **{"eval_data": [], "eval_every": None} | change))
    monkeypatch.setattr("pipelines.settings.trackers.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(EnvironmentProblem, match=f"--report-to {name}: .* pip install {name}"):
            preflight.check(settings(world, tmp_path, report_to=name))
    with pytest.raises(DataError, match="No such file"):
        preflight.check(settings(world, tmp_path, eval_data=[str(tmp_path / "nothing.jsonl")]))


def test_numbers_go_to_a_tracker_by_the_librarys_own_callback(world, tmp_path, monkeypatch):
    """A module in the place of tensorboard, which has what transformers' callback asks of it."""
    written = {}

    class SummaryWriter:
        def __init__(self, log_dir=None, **_):
            written["folder"] = log_dir

        def add_scalar(self, key, value, step):
            written.setdefault(key, {})[step] = value

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("pipelines.settings.trackers.find_spec", lambda name: True)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    run = train.run(settings(world, tmp_path / "run", report_to="tensorboard"))
    assert written["train/loss"].keys() == set(range(1, 7)) and written["eval/loss"].keys() == {2, 4, 6}
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= set(written)
    assert written["folder"] == str(run / "tensorboard"), "not a folder that is called after the host"


def events(folder):
    """(step, tag, value) of every scalar in the event files of a folder, whose records are length, sum, data, sum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value if not value.tensor.dtype
            ]
            at += 16 + size
    return found


def test_a_real_tracker_has_the_numbers_of_the_metrics_also_after_a_resume(world, tmp_path, script):
    """With tensorboardX where it is installed."""
    pytest.importorskip("tensorboardX")
    script([3, 1, 2], stop=4)
    with pytest.raises(KeyboardInterrupt):
        train.run(settings(world, tmp_path / "run", report_to="tensorboard"))
    script([3, 1, 2])
    run = train.run(settings(world, tmp_path / "run", report_to="tensorboard"))
    found = events(run / "tensorboard")
    for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("eval/loss", "eval_loss")):
        last = {step: value for step, name, value in found if name == tag}
        assert last == pytest.approx({e["step"]: e[key] for e in metrics(run) if key in e}, rel=1e-4)


# ------------------------------------------------------------------------------------------------- reports are last


def test_a_report_that_fails_loses_nothing_and_is_drawn_by_the_next_run(world, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("the pen is dry")

    with monkeypatch.context() as patch:
        patch.setattr(training_report, "render", fail)
        run = train.run(settings(world, tmp_path / "run"))
    said = capsys.readouterr().err
    assert "the report could not be drawn (RuntimeError: the pen is dry)" in said and str(run / "adapter") in said
    assert checkpoint_files.is_complete(run / "adapter") and not (run / "report.html").exists()
    monkeypatch.setattr(fit_module, "fit", fail)  # nothing is trained again
    train.run(settings(world, run))
    assert (run / "report.html").is_file()


# ------------------------------------------------------------------------------------------------------------ links


def test_no_link_in_a_run_folder_is_followed(world, tmp_path):
    """A run folder with one is refused when it is opened; one that comes later is replaced by what is saved."""
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "adapter_model.safetensors"
    precious.write_bytes(b"precious")
    run = train.run(settings(world, tmp_path / "run"))
    modes = {path.stat().st_mode & 0o777 for path in (run / "adapter").iterdir()}
    assert modes == {0o644}
    for planted in ("adapter", "checkpoints/checkpoint-6", "adapter/adapter_model.safetensors"):
        copy = shutil.copytree(run, tmp_path / "copy")
        if (copy / planted).is_dir():
            shutil.rmtree(copy / planted)
        else:
            (copy / planted).unlink()
        (copy / planted).symlink_to(precious if planted.endswith("s") else outside)
        with pytest.raises(DataError, match="is a symbolic link"):
            train.run(settings(world, copy))
        part = copy / planted.split("/adapter_")[0]
        assert not checkpoint_files.is_sound(part)
        train._keep(part, Part())
        assert not part.is_symlink() and checkpoint_files.is_sound(part)
        assert [path.name for path in outside.iterdir()] == [precious.name] and precious.read_bytes() == b"precious"
        shutil.rmtree(copy)


class Part:
    """Saves itself as peft's models and tokenizers do: by opening a file of a known name."""

    def save_pretrained(self, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"mine")
