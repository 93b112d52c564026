"""Files of models, adapters and checkpoints that are not what they should be: one line each, and no silent loss."""

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from datatools import DataError, DatatoolsError, UsageError
from pipelines.models import adapters, weight_files
from pipelines.models import load as models
from pipelines.models.adapters import load_adapter
from pipelines.models.base import unload
from pipelines.models.quiet import quiet
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import EvaluateConfig, TrainConfig
from pipelines.training import checkpoints
from pipelines.training.evaluation import evaluate
from pipelines.training.train import run as train
from tests.tiny import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` (a model), `lora` and `full` (a checkpoint each, without the list of files that would seal it)."""
    home = tmp_path_factory.mktemp("loading")
    save_tiny_model(home / "base")
    rows = write_rows(home / "rows.jsonl", 8)
    for name, lora in (("lora", LoraConfig(rank=2)), ("full", None)):
        recipe = TrainingConfig(epochs=1, batch_size=4)
        train(TrainConfig(model=ModelConfig(name=str(home / "base")), data=DataConfig(paths=[str(rows)]), lora=lora,
                          out=home / f"run-{name}", training=recipe))  # fmt: skip
        shutil.move(home / f"run-{name}" / "checkpoints" / "checkpoint-2", home / name)
        (home / name / "complete.json").unlink()
    return home


def config_of(folder: Path, **more: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), **more)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert isinstance(error.value, DatatoolsError)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1200, text
    assert "trust_remote_code=True" not in text and "weights_only" not in text  # advice that would run code
    return text


# ------------------------------------------------------------------------------------------- every file, every damage


def wrong_types(data: bytes) -> dict[str, bytes]:
    """Another value in the place of the JSON object `data`, and of each of its settings."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    found = {"list": b"[]", "number": b"3", "null": b"null", "text": b'"x"', "deep": b"[" * 100_000}
    for place, key in enumerate(value if isinstance(value, dict) else ()):  # each gets one of the kinds that it is not
        others = [other for other in (None, "x", [1], {"a": 1}) if type(other) is not type(value[key])]
        found[f"{key}="] = json.dumps({**value, key: others[place % len(others)]}).encode()
    return found


def damages(path: Path) -> dict[str, bytes | None]:
    data = path.read_bytes()
    plain: dict[str, bytes | None] = {"missing": None, "empty": b"", "cut": data[: len(data) // 2]}
    return plain | {"garbage": bytes(range(256)) * 8, "utf16": b'\xff\xfe{"a": 1}'} | wrong_types(data)


def open_model(folder: Path) -> None:
    models.load(config_of(folder), tokenizer_only=True)
    models.load(config_of(folder))


def open_checkpoint(base: Path) -> Callable[[Path], None]:
    model = models.load(config_of(base)).model

    def opened(folder: Path) -> None:
        [stop] = checkpoints.find([folder])
        with checkpoints.at(stop, config_of(base), model) as module:
            checkpoints.updates(stop, checkpoints.trainable(module), module=module, base=model)
        stop.digests()

    return opened


HARMLESS = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json", "README.md", "training_args.bin",
            "scheduler.pt", "rng_state.pth", "numerics.json")  # fmt: skip
"""Files that may be missing, for they are not needed."""


@pytest.mark.parametrize("kind", ["base", "lora", "full"])
def test_a_damaged_file_is_one_line_of_error(home: Path, tmp_path: Path, kind: str) -> None:
    opened = open_model if kind == "base" else open_checkpoint(home / "base")
    opened(home / kind)
    for path in sorted((home / kind).iterdir()):
        for damage, data in damages(path).items():
            folder = tmp_path / "x"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(home / kind, folder)
            (folder / path.name).unlink() if data is None else (folder / path.name).write_bytes(data)
            try:
                opened(folder)
            except DatatoolsError as error:
                text = str(error)
                assert "\n" not in text and len(text) < 1200, (path.name, damage, text)
            except BaseException as error:
                raise AssertionError(f"{path.name} {damage}: {type(error).__name__}") from error
            else:
                assert "=" in damage or path.name in HARMLESS, f"{path.name} {damage} was taken as it is"


@pytest.mark.parametrize("value", [None, "x", -1, float("nan"), float("inf"), [1], True, {}])
@pytest.mark.parametrize("key", ["learning_rate", "step"])
def test_an_odd_learning_rate_is_named(home: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = shutil.copytree(home / "lora", tmp_path / "x")
    state = json.loads((folder / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry[key] = value
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="trainer_state.json") as error:
        checkpoints.find([folder])
    one_line(error)


@pytest.mark.parametrize("change", [
    {"state": []}, {"state": {}}, {"state": {0: 1}}, {"param_groups": None}, {"param_groups": [1]},
    {"param_groups": [{}]},
])  # fmt: skip
def test_an_optimizer_state_of_wrong_types(home: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(home / "lora", tmp_path / "x")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    torch.save({**saved, **change}, folder / "optimizer.pt")
    with pytest.raises(DataError, match="optimizer.pt") as error:
        open_checkpoint(home / "base")(folder)
    one_line(error)


# ---------------------------------------------------------------------------------------------------- weights that fit


def changed(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    held = load_file(folder / name)
    save_file(change(held), folder / name, {"format": "pt"})
    return folder


def renamed(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"x_{name}": value for name, value in held.items()}


def test_renamed_weights_have_no_loss(home: Path, tmp_path: Path) -> None:
    folder = changed(shutil.copytree(home / "base", tmp_path / "x"), "model.safetensors", renamed)
    with pytest.raises(DataError, match=r"weights are missing \(.*weights have no place.*x_model") as error:
        evaluate(EvaluateConfig(model=config_of(folder), data=DataConfig(paths=[str(home / "rows.jsonl")])))
    assert "and 17 more" in one_line(error)  # 20 tensors, of which the first three are named


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_renamed_weights_of_a_checkpoint(home: Path, tmp_path: Path, kind: str) -> None:
    file = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    folder = changed(shutil.copytree(home / kind, tmp_path / "x"), file, renamed)
    with pytest.raises(DataError, match="x_model|no counterpart") as error:
        open_checkpoint(home / "base")(folder)
    one_line(error)


def test_renamed_weights_of_an_adapter(home: Path, tmp_path: Path) -> None:
    folder = changed(shutil.copytree(home / "lora", tmp_path / "x"), "adapter_model.safetensors", renamed)
    for merge in (True, False):
        with pytest.raises(DataError, match=r"32 weights have no counterpart \(.* and 29 more"):
            models.load(config_of(home / "base", adapter=folder), merge=merge)


@pytest.mark.parametrize("drop, match", [
    ("model.norm.weight", r"1 weight is missing \(model.norm.weight\)"),
    ("model.layers.1", "9 weights are missing"),
])  # fmt: skip
def test_missing_weights_are_named(home: Path, tmp_path: Path, drop: str, match: str) -> None:
    folder = changed(shutil.copytree(home / "base", tmp_path / "x"), "model.safetensors",
                     lambda held: {n: v for n, v in held.items() if not n.startswith(drop)})  # fmt: skip
    with pytest.raises(DataError, match=match):
        models.load(config_of(folder))


def test_weights_of_another_shape_are_named(home: Path, tmp_path: Path) -> None:
    folder = changed(shutil.copytree(home / "base", tmp_path / "x"), "model.safetensors",
                     lambda held: {**held, "model.norm.weight": torch.ones(7)})  # fmt: skip
    with pytest.raises(DataError, match=r"another shape \(model.norm.weight \[7\], not \[32\]\)"):
        models.load(config_of(folder))


def test_weights_that_were_saved_as_integers_are_refused(home: Path, tmp_path: Path) -> None:
    """They were cast: a matrix of fractions became zeros, and `evaluate` returned a loss."""
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = changed(shutil.copytree(home / "base", tmp_path / "x"), "model.safetensors",
                     lambda held: {**held, name: held[name].to(torch.int8)})  # fmt: skip
    with pytest.raises(DataError, match=rf"1 weight is saved as integers \({name}\)"):
        models.load(config_of(folder))
    adapter = changed(shutil.copytree(home / "lora", tmp_path / "a"), "adapter_model.safetensors",
                      lambda held: {n: v.to(torch.int8) for n, v in held.items()})  # fmt: skip
    (adapter / "complete.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="weights are saved as integers"):
        models.load(config_of(home / "base", adapter=adapter))


@pytest.mark.parametrize("setting, value, match", [
    ("target_modules", "(.+)+!", "target_modules in adapter_config.json against the .* layers of the model takes more"),
    ("exclude_modules", ".*.*.*.*.*.*.*.*.*.*.*!", "exclude_modules in adapter_config.json against"),
    ("rank_pattern", {"(a|.+)+!": 4}, "rank_pattern in adapter_config.json against"),
    ("layers_pattern", ["(.+)+!"], "layers_pattern in adapter_config.json against"),
    ("target_modules", "(q_proj", "target_modules in adapter_config.json is not a regular expression"),
])  # fmt: skip
def test_a_pattern_that_matches_forever_is_refused(
    home: Path, tmp_path: Path, setting: str, value: Any, match: str
) -> None:
    """peft matched it against every layer, for years."""
    adapter = shutil.copytree(home / "lora", tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(DataError, match=match):
        models.load(config_of(home / "base", adapter=adapter))


def test_a_classifier_is_not_a_language_model(tmp_path: Path, home: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    for tied in (True, False):
        config = LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=4, tie_word_embeddings=tied)  # fmt: skip
        folder = shutil.copytree(home / "base", tmp_path / f"tied-{tied}")
        LlamaForSequenceClassification(config).save_pretrained(folder)
        with pytest.raises(DataError, match=r"score\.weight"):
            models.load(config_of(folder))


def test_weights_that_are_rightly_absent_or_too_many_load(home: Path, tmp_path: Path) -> None:
    """The tied head is not in the file; older checkpoints hold a buffer that is computed today."""
    assert "lm_head.weight" not in load_file(home / "base" / "model.safetensors")
    folder = changed(shutil.copytree(home / "base", tmp_path / "x"), "model.safetensors", lambda held: {
        **held, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight":
        held["model.embed_tokens.weight"].clone()})  # fmt: skip
    plain, other = (models.load(config_of(f)).model for f in (home / "base", folder))
    ids = torch.arange(5)[None]
    assert torch.equal(plain(input_ids=ids).logits, other(input_ids=ids).logits)


# --------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def sharded(home: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(home / "base", tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    models.load(config_of(home / "base")).model.save_pretrained(folder, max_shard_size="20KB")
    models.load(config_of(folder))
    return folder


def indexed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / weight_files.INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def test_shards_that_the_index_leaves_out(sharded: Path) -> None:
    last = sorted(sharded.glob("model-*.safetensors"))[-1].name
    indexed(sharded, lambda index: {**index, "weight_map": {k: v for k, v in index["weight_map"].items() if v != last}})
    with pytest.raises(DataError, match="missing"):
        models.load(config_of(sharded))


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(DataError, match=f"names the shard {first.name}, which is missing"):
        models.load(config_of(sharded))


@pytest.mark.parametrize("name, match", [
    ("pytorch_model-1.bin", "never pickles"), ("../base/model.safetensors", "not a file in its folder"),
    ("/etc/hostname", "not a file in its folder"), ("a\\b.safetensors", "not a file in its folder"),
    (3, "not an index of shards"), (None, "not an index of shards"),
])  # fmt: skip
def test_an_index_points_to_safetensors_beside_it(sharded: Path, name: object, match: str) -> None:
    (sharded / "pytorch_model-1.bin").write_bytes(b"")
    indexed(sharded, lambda index: {**index, "weight_map": dict.fromkeys(index["weight_map"], name)})
    with pytest.raises(DataError, match=match) as error:
        models.load(config_of(sharded))
    one_line(error)


@pytest.mark.parametrize("value", [[], 3, None, {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_that_is_none(sharded: Path, value: object) -> None:
    indexed(sharded, lambda _: value)
    with pytest.raises(DataError, match="not an index of shards"):
        models.load(config_of(sharded))


# -------------------------------------------------------------------------------------------- kinds of models, adapters


@pytest.mark.parametrize("quantised", [
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4}, {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    {"quant_method": "hqq"}, {"quant_method": "aqlm"}, {"quant_method": "compressed-tensors"},
])  # fmt: skip
def test_a_quantised_model_whose_package_is_not_here(home: Path, tmp_path: Path, quantised: object) -> None:
    folder = quantised_as(home, tmp_path, quantised)
    with pytest.raises(DatatoolsError) as error:
        models.load(config_of(folder))
    one_line(error)


@pytest.mark.parametrize("odd", [{"quant_method": None}, {"quant_method": ["x"]}, {}, [], "x", 3])
def test_an_odd_quantisation_is_no_traceback(home: Path, tmp_path: Path, odd: object) -> None:
    with suppress(DatatoolsError):  # or it is none at all, and the weights are complete
        models.load(config_of(quantised_as(home, tmp_path, odd)))


def quantised_as(home: Path, tmp_path: Path, setting: object) -> Path:
    folder = shutil.copytree(home / "base", tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": setting}))
    return folder


def test_a_folder_with_a_model_and_an_adapter_is_refused(home: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, from anywhere."""
    folder = shutil.copytree(home / "base", tmp_path / "x")
    shutil.copy(home / "lora" / "adapter_config.json", folder)
    with pytest.raises(UsageError, match="and an adapter"):
        models.load(config_of(folder))


@pytest.mark.parametrize("change, match", [
    ({"peft_type": "PROMPT_TUNING"}, "adds tokens before a row"), ({"peft_type": "XLORA"}, "is not supported"),
    ({"peft_type": "SHADOW", "shadow_model": "/x"}, "is not supported"), ({"peft_type": None}, "is not supported"),
    ({"peft_type": ["LORA"]}, "is not supported"), ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "imports"),
    ({"alora_invocation_tokens": [1]}, "inside a row"), ({"use_rslora": "no"}, "expected true or false"),
    ({"lora_alpha": float("nan")}, "finite"), ({"r": "x"}, "does not fit"), ({"target_modules": [3]}, "does not fit"),
])  # fmt: skip
def test_adapters_that_are_not_read(home: Path, tmp_path: Path, change: dict[str, Any], match: str) -> None:
    folder = shutil.copytree(home / "lora", tmp_path / "x")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(DataError, match=match) as error:
        models.load(config_of(home / "base", adapter=folder))
    one_line(error)


_NEEDED: dict[str, dict[str, Any]] = {
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ADALORA": {"total_step": 10}, "FOURIERFT": {"n_frequency": 20}, "WAVEFT": {"n_frequency": 20},
    "C3A": {"block_size": 16}, "VBLORA": {"vector_length": 16, "num_vectors": 16}, "SHIRA": {"r": 2},
    "ROAD": {"group_size": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wider") / "model", hidden=64, layers=1)


@pytest.mark.parametrize("kind", sorted(adapters.KINDS))
def test_every_kind_of_adapter_is_read_as_it_was_saved(wider: Path, tmp_path: Path, kind: str) -> None:
    from dataclasses import fields

    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"} | _NEEDED.get(kind, {})
    if "token_indices" not in options and "target_modules" in {field.name for field in fields(made)}:
        options = {"target_modules": ["q_proj", "v_proj"]} | options
    ids, base = torch.arange(2, 12)[None], models.load(config_of(wider)).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = base(input_ids=ids).logits
        made_here = get_peft_model(base, made(**options))
        for parameter in made_here.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        wanted = made_here.eval()(input_ids=ids).logits
        made_here.save_pretrained(tmp_path)
        model = models.load(config_of(wider)).model
        wrapped = load_adapter(model, tmp_path)
        assert not torch.allclose(plain, wanted, atol=1e-3)
        torch.testing.assert_close(wrapped(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
        unload(wrapped)
        assert torch.equal(model(input_ids=ids).logits, plain)
