"""Weights in 4 and 8 bits: the gradients of adapters on them are exact, and what they cannot do is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datatools import DataError, EnvironmentProblem, UsageError, per_sample_grads
from datatools.colm.replay import evaluating
from pipelines.diagnose.run import run as diagnose
from pipelines.models import causal, quantized
from pipelines.models import load as models
from pipelines.models.lora import add_lora, logits, lora_parameters
from pipelines.models.losses import row_losses
from pipelines.rows import preflight
from pipelines.settings.diagnose import DiagnoseConfig
from pipelines.settings.parts import DataConfig, LoraConfig, ModelConfig, TrainingConfig
from pipelines.settings.train import TrainConfig
from pipelines.training.train import run as train
from tests.conftest import REPOSITORY
from tests.tiny import save_tiny_model, write_rows

pytest.importorskip("bitsandbytes", reason="pip install datatools-llm[quantized]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("quantized") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


def loaded(folder: Path, **more: Any) -> Any:
    return models.load(ModelConfig(name=str(folder), **more)).model


def adapted(model: nn.Module) -> Any:
    module = add_lora(model, LoraConfig(rank=2, targets="auto"), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in lora_parameters(module).items():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return module


BATCH = {
    "input_ids": torch.arange(18).reshape(3, 6) + 1,
    "attention_mask": torch.ones(3, 6, dtype=torch.int64),
    "labels": torch.arange(18).reshape(3, 6) + 1,
}


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_gradients_of_adapters_are_those_of_each_row(folder: Path, kind: str) -> None:
    module = adapted(loaded(folder, quantize=kind))
    names = list(lora_parameters(module))
    fast, slow = (per_sample_grads(row_losses, module, BATCH, names, method=method) for method in ("hooks", "loop"))
    for name in names:
        assert slow[name].abs().max() > 0
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-6)


def test_a_pass_without_gradients_changes_no_gradient(folder: Path) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes would move the weights into a layout without a backward pass."""
    module = adapted(loaded(folder, quantize="4bit"))
    names = list(lora_parameters(module))
    first = per_sample_grads(row_losses, module, BATCH, names)
    before = logits(module, BATCH["input_ids"])
    again = per_sample_grads(row_losses, module, BATCH, names)
    assert torch.equal(before, logits(module, BATCH["input_ids"]))
    assert all(torch.equal(first[name], again[name]) and first[name].abs().max() > 0 for name in names)
    assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in module.modules())


def test_weights_in_a_layout_without_gradients_are_refused(folder: Path) -> None:
    model = loaded(folder, quantize="4bit")
    quantized.layers(model)[0].weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    with pytest.raises(DataError, match="layout that has no gradients"):
        causal.check(model, "x")


def test_the_weights_are_held_in_few_bits_and_named(folder: Path) -> None:
    plain, four, eight = (
        models.load(ModelConfig(name=str(folder), quantize=kind)) for kind in ("none", "4bit", "8bit")
    )
    sizes = [sum(p.numel() * p.element_size() for p in found.model.parameters()) for found in (plain, four, eight)]
    assert sizes[1] < sizes[2] < sizes[0]
    assert len({tuple(sorted(found.digests.items())) for found in (plain, four, eight)}) == 3


def saved(folder: Path, to: Path, **setting: Any) -> Path:
    """The model as `save_pretrained` writes it once it is quantized."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    how = BitsAndBytesConfig(**setting)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def test_saved_weights_are_read_as_they_were_made(folder: Path, tmp_path: Path) -> None:
    there = saved(folder, tmp_path / "four", load_in_4bit=True, bnb_4bit_quant_type="nf4",
                  bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    ids = BATCH["input_ids"]
    torch.testing.assert_close(logits(loaded(there), ids), logits(loaded(folder, quantize="4bit"), ids))
    with pytest.raises(UsageError, match="are quantized already"):
        loaded(there, quantize="4bit")


def test_outliers_that_are_sought_over_a_batch_are_refused(folder: Path, tmp_path: Path) -> None:
    there = saved(folder, tmp_path / "eight", load_in_8bit=True)
    with pytest.raises(DataError, match="llm_int8_threshold 6.0"):
        loaded(there)
    config = json.loads((there / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    (there / "config.json").write_text(json.dumps(config))
    assert quantized.layers(loaded(there))


def test_a_model_in_memory_that_seeks_outliers_is_refused(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    with pytest.raises(DataError, match="where it is loaded"):
        causal.check(model, "x")


class Packed(nn.Module):
    """A linear layer as GPTQ and AWQ hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    "held",
    [
        Packed(),
        nn.ParameterDict({"W_q": nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)}),
        nn.ParameterDict({"weight": nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)}),
    ],
)
def test_weights_of_other_packages_are_refused_by_name(folder: Path, held: nn.Module) -> None:
    model = loaded(folder)
    model.model.layers[1].mlp.down_proj = held
    with pytest.raises(DataError, match="model.layers.1.mlp.down_proj.* is quantized"):
        causal.check(model, "x")


def test_training_all_weights_is_refused(folder: Path, rows: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=ModelConfig(name=str(folder), quantize="4bit"), data=DataConfig(paths=[str(rows)]), lora=None,
        out=tmp_path / "run", training=TrainingConfig(epochs=1, batch_size=4),
    )  # fmt: skip
    with pytest.raises(UsageError, match="this trains all weights"):
        train(config)
    with pytest.raises(UsageError, match="this trains all weights"):
        diagnose(DiagnoseConfig(model=config.model, data=config.data, out=tmp_path / "other"))


def test_an_adapter_is_trained_but_never_merged(folder: Path, rows: Path, tmp_path: Path) -> None:
    model = ModelConfig(name=str(folder), quantize="4bit")
    train(
        TrainConfig(model=model, data=DataConfig(paths=[str(rows)]), lora=LoraConfig(rank=2), out=tmp_path / "run",
                    training=TrainingConfig(epochs=1, batch_size=4))
    )  # fmt: skip
    with_adapter = model.model_copy(update={"adapter": tmp_path / "run" / "adapter"})
    assert lora_parameters(models.load(with_adapter, merge=False).model)
    with pytest.raises(UsageError, match="merged into weights of 4 or 8 bits"):
        models.load(with_adapter)
    with pytest.raises(UsageError, match="a run that trained all weights"):
        models.load(model, weights=folder)


def test_rounded_activations_cannot_tell_orders_apart(folder: Path) -> None:
    quantized.refuse_rounding(loaded(folder, quantize="4bit"))
    with pytest.raises(UsageError, match="--quantize 4bit"):
        quantized.refuse_rounding(loaded(folder, quantize="8bit"))


def test_without_the_package_the_flag_names_it(
    folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    config = TrainConfig(
        model=ModelConfig(name=str(folder), quantize="8bit"), data=DataConfig(paths=[str(rows)]), out=tmp_path / "run"
    )
    with pytest.raises(EnvironmentProblem, match="datatools-llm.quantized."):
        preflight.check(config)


def test_the_package_fetches_no_code_while_it_is_imported(tmp_path: Path) -> None:
    """Whoever imports it: peft does, and transformers' trainer imports peft."""
    for name, text in (("bitsandbytes", "import kernels\n"), ("kernels", "print('fetched')\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    script = (
        "import pipelines\ntry:\n    import bitsandbytes\nexcept ImportError:\n    print('no kernels')\nimport kernels"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["no kernels", "fetched"]


@pytest.mark.parametrize("use", ["gradients", "coresets"])
def test_a_model_of_the_caller_keeps_its_gradients(folder: Path, use: str) -> None:
    """`per_sample_grads` and coresets switch the layout without gradients off by themselves."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    module = adapted(AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32))
    adapters = lora_parameters(module)
    if use == "gradients":
        per_sample_grads(row_losses, module, BATCH, list(adapters))
    else:
        with evaluating(module), torch.no_grad():
            module(input_ids=BATCH["input_ids"])
    logits(module, BATCH["input_ids"])
    grads = torch.autograd.grad(row_losses(module, BATCH).sum(), list(adapters.values()), allow_unused=True)
    assert all(g is not None and g.abs().max() > 0 for g in grads)
