"""What a run of `datatools order` believes: damaged files are made again, edited results refused, a full disk said."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from datatools import DataError, EnvironmentProblem, Order
from datatools.files import sealed
from pipelines.order.run import run
from pipelines.report import order_page as order_report
from pipelines.settings.order import OrderConfig, OrderData, OrderTraining
from pipelines.settings.parts import ModelConfig
from tests.tiny import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order-files")
    save_tiny_model(folder / "model", layers=1, hidden=16)
    write_rows(folder / "data.jsonl", 40)
    return folder


def settings(world: Path, out: Path, **changes: Any) -> OrderConfig:
    base: dict[str, Any] = {
        "model": ModelConfig(name=str(world / "model")), "data": OrderData(paths=[str(world / "data.jsonl")]),
        "out": out, "training": OrderTraining(batch_size=4, learning_rate=1e-3), "batches": 3, "held_out": 4,
        "orders": 2, "seeds": 0, "estimators": ["pairwise", "moments"], "warmup_steps": 1,
    }  # fmt: skip
    return OrderConfig.model_validate(base | changes)


def results(folder: Path) -> dict[str, Any]:
    """What was found, without how long it took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not k.startswith("seconds") and k != "seal"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    found = {p.name: timeless(json.loads(p.read_text())) for p in folder.glob("*.json") if p.stem in order_report.PARTS}
    return found | {"reference.npz": (folder / "reference.npz").read_bytes()}


def flip(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)


def cut(path: Path, at: float) -> None:
    os.truncate(path, int(at * path.stat().st_size))


def test_damaged_files_are_made_again_and_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(settings(world, tmp_path / "run"))
    run(settings(world, out, task="map", map_batches=1, map_positions=2, completions=1))
    whole = results(out)
    believed = [p for folder in ("reference", "true", "estimates", "surrogates", "maps")
                for p in sorted((out / folder).rglob("*.*"))]  # fmt: skip
    assert {p.suffix for p in believed} == {".json", ".safetensors"} and len(believed) > 12
    for damage in (flip, cut):
        for number, path in enumerate(believed):
            damage(path, number / len(believed))
        capsys.readouterr()
        run(settings(world, out))
        run(settings(world, out, task="map", map_batches=1, map_positions=2, completions=1))
        said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("; it is computed again")]
        assert results(out) == whole
        of = {Path(line.split(" is damaged")[0].split(" has no seal")[0].removeprefix("warning: ")) for line in said}
        assert {p.relative_to(out).parts[0] for p in of} == {"reference", "true", "estimates", "surrogates", "maps"}
    capsys.readouterr()
    run(settings(world, out))
    assert "it is computed again" not in capsys.readouterr().err


def test_a_true_loss_that_was_edited_is_not_believed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(settings(world, tmp_path / "run", estimators=["pairwise"]))
    whole = results(out)
    for path in (out / "true").iterdir():
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"loss": found["loss"] - 1}))
    run(settings(world, out, estimators=["pairwise"]))
    assert results(out) == whole and "is damaged or was edited" in capsys.readouterr().err


def test_an_edited_result_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    out = run(settings(world, tmp_path / "run", estimators=["pairwise"]))
    path = out / "validation.json"
    found = json.loads(path.read_text())
    found["estimators"]["pairwise"]["spearman"] = 0.99
    path.write_text(json.dumps(found))
    said = "validation.json is damaged or was edited: .*; write it again with `datatools order validate --out"
    with pytest.raises(DataError, match=said):
        order_report.render(out)
    with pytest.raises(DataError, match=said):
        run(settings(world, out, task="estimate", estimators=["pairwise"]))
    run(settings(world, out, estimators=["pairwise"]))
    assert sealed.read_json(path)["estimators"]["pairwise"]["spearman"] != 0.99


def test_a_disk_that_is_full_at_any_write_is_a_line_and_the_run_goes_on_after_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(run(settings(world, tmp_path / "whole")))
    real, left = os.write, [0]

    def write(descriptor: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    stopped: list[str] = []
    for attempt in range(40):
        left[0] = 11 + 4 * attempt
        try:
            run(settings(world, tmp_path / "run"))
            break
        except EnvironmentProblem as error:
            stopped.append(str(error))
    assert len(stopped) > 5 and all("No space left on device" in text and "\n" not in text for text in stopped)
    assert results(tmp_path / "run") == whole
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_orders_to_estimate_that_cannot_be_are_refused_by_file(world: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run", task="estimate", estimators=["pairwise"])
    plan = Order.load(run(config) / "reference.npz")
    for sequence, said in [((0, 0, 1), "appears 2 times, but 1 times"), ((0, 1), "2 steps, the reference has 3")]:
        Order(plan.batches, sequence).save(tmp_path / "odd.npz")
        with pytest.raises(DataError, match=rf"odd.npz: order: .*{said}"):
            run(config.model_copy(update={"sequences": [tmp_path / "odd.npz"]}))
