"""A run folder that somebody sent: no command runs its code, writes outside of it, or follows its links out."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from datatools import DatatoolsError, UsageError
from pipelines.cli import app as cli
from pipelines.models import load as models
from pipelines.rows.encode import Encoder
from pipelines.runs import run_files
from pipelines.select.run import run as select
from pipelines.settings.load import audit_base, load_config, order_base
from pipelines.settings.parts import DataConfig, ModelConfig
from pipelines.settings.select import SelectConfig, WarmupConfig
from tests.pipelines.conftest import World
from tests.tiny import save_tiny_model, write_rows

CODE = """
from pathlib import Path
Path({canary!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "theirs"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def hostile(folder: Path, canary: Path, *, kind: str = "theirs", where: str = "config") -> Path:
    """A tiny model with code of its own beside it, which its configuration, or its tokenizer's, asks to run."""
    save_tiny_model(folder)
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    if where == "config":
        config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": kind}
        config["architectures"] = ["Model"]
    elif where == "tokenizer":
        code = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        tokenizer |= {"auto_map": code, "tokenizer_class": "Tokenizer"}
    elif where == "attention":
        config["attn_implementation"] = "somebody/attention"
    elif where == "generation":
        generation = json.loads((folder / "generation_config.json").read_text())
        generation |= {"custom_generate": "evil.py", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def refused(argv: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command line, which must be one line."""
    code = cli.main([str(part) for part in argv])
    text = capsys.readouterr().err
    assert code in (2, 3, 4), text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]


# ------------------------------------------------------------------------------------------------------ a plain model


@pytest.mark.parametrize("where", ["config", "tokenizer", "attention"])
@pytest.mark.parametrize("command", ["evaluate", "train", "diagnose", "select", "order"])
def test_code_of_a_model_is_not_run(
    world: World, tmp_path: Path, canary: Path, where: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hostile(tmp_path / "model", canary, where=where)
    data = {"evaluate": ["--data", world.pool], "select": ["--train", world.pool, "--target", world.target]}
    argv: list[object] = [command, "--model", model, *data.get(command, ["--data", world.pool])]
    if command == "order":
        argv.insert(1, "record")
    error = refused(argv if command == "evaluate" else [*argv, "--out", tmp_path / "out"], capsys)
    assert "--trust-remote-code" in error and not canary.exists()


def test_code_of_a_model_that_transformers_knows_is_not_run(tmp_path: Path, canary: Path) -> None:
    """Then the library's own class reads it; what does not fit that class is refused by its weights."""
    for where, kind in (("config", "llama"), ("generation", "llama")):
        folder = hostile(tmp_path / where, canary, where=where, kind=kind)
        assert type(models.load(ModelConfig(name=str(folder))).model).__module__.startswith("transformers.models.llama")
    assert not canary.exists()


def test_the_flag_allows_it(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    loaded = models.load(ModelConfig(name=str(hostile(tmp_path / "model", canary)), trust_remote_code=True))
    assert canary.read_text() == "ran"
    assert "evil.py" in loaded.digests  # what ran belongs to what identifies the model


def test_an_adapters_tokenizer_runs_no_code(world: World, tmp_path: Path, canary: Path) -> None:
    adapter = hostile(tmp_path / "adapter", canary, where="tokenizer")
    (adapter / "config.json").unlink()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="--trust-remote-code"):
        models.load(ModelConfig(name=str(world.model), adapter=adapter), tokenizer_only=True)
    assert not canary.exists()


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% set x = messages.append(1) %}",
])  # fmt: skip
def test_a_template_does_not_leave_its_sandbox(world: World, tmp_path: Path, canary: Path, template: str) -> None:
    loaded = models.load(ModelConfig(name=str(world.model)), tokenizer_only=True)
    path = tmp_path / "x.jinja"
    path.write_text(template.replace("CANARY", str(canary)))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises((DatatoolsError, Exception)) as error:
        encoder = Encoder(loaded.tokenizer, chat=str(path), max_length=100, on_long="truncate")
        encoder.template.read(messages)
    assert not isinstance(error.value, AssertionError)
    assert not canary.exists()


# ------------------------------------------------------------------------------------------------------- a run folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    save_tiny_model(home / "model")
    config = SelectConfig(
        model=ModelConfig(name=str(home / "model")), train=DataConfig(paths=[str(write_rows(home / "pool.jsonl", 20))]),
        target=[str(write_rows(home / "target.jsonl", 2, start=90))], method="tfidf", budget="3", out=home / "run",
        warmup=WarmupConfig(minimum_rows=8, epochs=1),
    )  # fmt: skip
    select(config)
    return home


@pytest.fixture
def received(finished: Path, tmp_path: Path) -> Path:
    """The same run in another place."""
    return shutil.copytree(finished / "run", tmp_path / "received")


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "run.yaml"
    first, _, rest = path.read_text().partition("\n")
    settings: dict[str, Any] = yaml.safe_load(rest)
    for name, value in changes.items():
        here = settings
        *above, last = name.split("__")
        for part in above:
            here = here.setdefault(part, {})
        here[last] = value
    path.write_text(first + "\n" + json.dumps(settings) + "\n")
    run_files.adopt(folder)  # as whoever sends it can
    return settings


def commands(folder: Path, finished: Path) -> dict[str, list[object]]:
    """The command lines that take settings from the run folder `folder`."""
    rows = finished / "pool.jsonl"
    return {
        "explain": ["explain", f"{folder}/selected.jsonl:1"],
        "audit": ["audit", "--selected", folder / "selected.jsonl", "--test", rows, "--allow-overlap"],
        "select": ["select", folder / "run.yaml", "--out", folder],
        "resume": ["select", "--model", finished / "model", "--train", rows, "--config", folder / "run.yaml"],
    }


@pytest.mark.parametrize("command", ["explain", "audit", "select", "resume"])
def test_a_run_folder_runs_no_code(
    received: Path, finished: Path, tmp_path: Path, canary: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(received, model__name=str(hostile(tmp_path / "model", canary)), model__trust_remote_code=True)
    error = refused(commands(received, finished)[command], capsys)
    assert "--trust-remote-code" in error and "run.yaml" in error
    assert not canary.exists()
    assert "--trust-remote-code" in refused(["train", received / "run.yaml"], capsys) or not canary.exists()


@pytest.mark.parametrize(
    "model, task",
    [
        ("TrainConfig", "train"),
        ("OrderConfig", "order"),
        ("DiagnoseConfig", "diagnose"),
        ("EvaluateConfig", "evaluate"),
    ],
)
def test_a_settings_file_runs_no_code(
    finished: Path, tmp_path: Path, canary: Path, model: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As run.yaml in a folder that `order` continues, and as any YAML file that a command is given."""
    folder = tmp_path / "sent"
    folder.mkdir()
    settings = {
        "model": {"name": str(hostile(tmp_path / "model", canary)), "trust_remote_code": True},
        "data": {"paths": [str(finished / "pool.jsonl")]},
    }
    for name in ("run.yaml", "settings.yaml"):
        (folder / name).write_text(json.dumps(settings))
        assert "--trust-remote-code" in refused([task, folder / name], capsys)
    if task == "order":
        for part in ("record", "search", "map", "validate", "estimate"):
            assert "--trust-remote-code" in refused([task, part, "--out", folder], capsys)
    assert not canary.exists()


def test_what_names_code_elsewhere_is_no_setting(
    received: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plugins", "callbacks", "model__plugins", "model__code_revision"):
        folder = shutil.copytree(received, received.with_name(name))
        edit(folder, **{name: ["os.system"]})
        for command, argv in commands(folder, finished).items():
            if command != "audit" or name.startswith("model"):  # an audit takes over nothing else
                assert "has no setting" in refused(argv, capsys)


def test_reports_are_drawn_without_the_model(received: Path, tmp_path: Path, canary: Path) -> None:
    edit(received, model__name=str(hostile(tmp_path / "model", canary)), model__trust_remote_code=True)
    assert cli.main(["report", str(received)]) == 0
    assert not canary.exists()


# -------------------------------------------------------------------------------------------------------- places, links


@pytest.mark.parametrize("out", ["/somewhere/else", "../beside", "relative/run"])
def test_a_runs_file_does_not_say_where_to_write(
    received: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    edit(received, out=out)
    assert "--out DIR" in refused(["select", received / "run.yaml"], capsys)
    assert not (tmp_path / "beside").exists() and not (tmp_path / "relative").exists()


def test_a_runs_file_does_not_say_where_features_go(
    received: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(received, features__folder=str(tmp_path / "elsewhere"), out=str(received))
    assert "--set features.folder=DIR" in refused(["select", received / "run.yaml"], capsys)
    base, _ = audit_base(received / "selected.jsonl")
    assert base["features"] == str(received / "features") and base["out"] == str(received / "audit")
    edit(received, overwrite=True, features__folder=None)
    assert "sets overwrite" in refused(["select", received / "run.yaml"], capsys)


def test_an_order_run_is_continued_where_it_is(received: Path) -> None:
    edit(received, out="/somewhere/else")
    assert order_base(received)[0]["out"] == str(received)


def test_what_the_user_may_go_on_doing(received: Path, finished: Path, tmp_path: Path) -> None:
    """Rows and models elsewhere, a run repeated where it is, settings of one's own that write anywhere."""
    edit(received, out=str(received))
    assert load_config(SelectConfig, received / "run.yaml").model.name == str(finished / "model")
    assert cli.main(["select", str(received / "run.yaml"), "--quiet"]) == 0
    settings = tmp_path / "settings.yaml"
    settings.write_text((received / "run.yaml").read_text())
    edit_out = {"out": tmp_path / "other", "model.trust_remote_code": True}
    assert load_config(SelectConfig, settings, edit_out).model.trust_remote_code
    link = tmp_path / "link"
    link.symlink_to(received)
    assert cli.main(["report", str(link)]) == 0


@pytest.mark.parametrize("name", ["inputs/x", "features", "report.html", "warmup", "events.jsonl"])
def test_links_out_of_a_run_folder_are_refused(
    received: Path, finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = received / name
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside / "file" if "." in name else outside)
    for argv in [*commands(received, finished).values(), ["report", received]]:
        if argv[0] != "select":
            error = refused(argv, capsys)
            assert "is a symbolic link" in error or "not inside the folder of the run" in error
    same = ["--method", "tfidf", "--budget", "3", "--epochs", "1", "--set", "warmup.minimum_rows=8"]
    again = ["select", "--model", finished / "model", "--train", finished / "pool.jsonl", "--target",
             finished / "target.jsonl", *same, "--out", received]  # fmt: skip
    assert "is a symbolic link" in refused(again, capsys)
    assert not any(outside.iterdir())


def test_a_pipe_in_a_run_folder_does_not_hang(received: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    (received / "summary.json").unlink()
    os.mkfifo(received / "summary.json")
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(refused(["report", received], capsys)), daemon=True)
    thread.start()
    thread.join(20)
    assert done and "is a named pipe" in done[0]
