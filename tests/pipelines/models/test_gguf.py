"""A GGUF file is converted once; a damaged conversion is made again, a damaged file refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from datatools import DataError, DatatoolsError
from pipelines.models import gguf
from pipelines.models import load as models
from pipelines.settings.parts import ModelConfig


def write_gguf(path: Path, *, leave_out: str = "", rename: str = "") -> Path:
    """A llama of one layer with a byte vocabulary, as llama.cpp names things."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "ab"]
    width, heads, feed, vocabulary = 32, 4, 64, len(tokens)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (vocabulary - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd.weight": (vocabulary, width), "output_norm.weight": (width,), "output.weight": (vocabulary, width),
        "blk.0.attn_norm.weight": (width,), "blk.0.ffn_norm.weight": (width,),
        **{f"blk.0.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (feed, width) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": (width, feed),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != leave_out:
            value = random.normal(size=shape).astype(np.float32) * 0.1
            writer.add_tensor(name.replace("blk", rename) if rename else name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATATOOLS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def logits(path: Path) -> torch.Tensor:
    found: torch.Tensor = models.load(ModelConfig(name=str(path))).model(input_ids=torch.arange(6)[None]).logits
    return found.detach()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 64
    path.write_bytes(data)


def test_a_damaged_conversion_is_made_again(whole: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = logits(whole)
    [folder] = cache.iterdir()
    sealed = json.loads((folder / "complete.json").read_text())
    assert logits(whole).equal(wanted) and "damaged" not in capsys.readouterr().err
    for name in ("model.safetensors", "config.json", "tokenizer.json", "complete.json"):
        for harm in ("flip", "truncate", "empty", "remove") if name == "model.safetensors" else ("flip",):
            path = folder / name
            data = path.read_bytes()
            if harm == "flip":
                flip(path, len(data) * 3 // 4)
            elif harm == "remove":
                path.unlink()
            else:
                path.write_bytes(data[: len(data) // 2 if harm == "truncate" else 0])
            assert logits(whole).equal(wanted), (name, harm)
            # a seal whose own text is harmed where nothing depends on it may stand
            assert "created again" in capsys.readouterr().err or name == "complete.json", (name, harm)
            assert json.loads((folder / "complete.json").read_text())["files"] == sealed["files"]
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x")  # what nobody sealed
    assert logits(whole).equal(wanted) and "created again" in capsys.readouterr().err


def test_a_half_written_or_older_conversion_is_not_used(whole: Path, cache: Path) -> None:
    wanted = logits(whole)
    [folder] = cache.iterdir()
    older = folder.with_name(folder.name.replace(f"-v{gguf.FORMAT}", "-v1"))
    folder.rename(older)
    flip(older / "model.safetensors", 5000)
    assert logits(whole).equal(wanted) and folder.is_dir()
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(older / "model.safetensors", folder)
    assert logits(whole).equal(wanted)
    sealed = json.loads((folder / "complete.json").read_text())
    for odd in ({}, [], {"files": []}, {**sealed, "files": {"../x": "0"}}, {**sealed, "files": None}):
        (folder / "complete.json").write_text(json.dumps(odd))
        assert logits(whole).equal(wanted)


def test_it_is_read_once_a_process(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load(ModelConfig(name=str(whole)))
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    again = models.load(ModelConfig(name=str(whole)))
    assert again.digests == loaded.digests and "model.safetensors" in again.digests
    assert "complete.json" not in again.digests


def test_weights_of_a_gguf_file_that_do_not_fit(tmp_path: Path) -> None:
    for kind in ({"leave_out": "blk.0.ffn_up.weight"}, {"rename": "layer"}):
        with pytest.raises(DataError, match="missing") as error:
            models.load(ModelConfig(name=str(write_gguf(tmp_path / "x.gguf", **kind))))
        assert "\n" not in str(error.value)


def test_a_damaged_gguf_file_is_one_line(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    harms = {
        "empty": b"", "magic": data[:4], "header": data[:20], "metadata": data[:300], "half": data[: len(data) // 2],
        "last byte": data[:-1], "other": b"ZZZZ" + data[4:], "zeros": bytes(1000), "version": data[:4] + b"\xff" * 8,
        "count": data[:8] + b"\xff" * 8 + data[16:], "kinds": data[:32] + bytes(255 for _ in range(64)) + data[96:],
        "text": b"GGUF is a file format", "json": b"{}",
    }  # fmt: skip
    for name, harm in harms.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(harm)
        with pytest.raises(DatatoolsError) as error:
            models.load(ModelConfig(name=str(path)))
        assert "\n" not in str(error.value) and str(path) in str(error.value), name
