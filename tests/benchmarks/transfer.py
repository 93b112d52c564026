"""Does the choice of a smaller model serve a larger one? Layers are dropped, and the selections compared.

    python -m tests.benchmarks.transfer --model ../shared/data/models/stories260k --chat tulu --out runs/transfer
    python -m tests.benchmarks.compare_selections --select-with runs/transfer/models/half --out runs/transfer-trained

The first command saves the model with half and with a quarter of its layers, evenly spaced, and prints which share of
the rows that each of them selects the whole model selects too (Jaccard index), beside that of another seed of the
warm-up and of random rows. The second trains the whole model on what the smaller one selected, to be compared with a
run of `compare_selections` without `--select-with`.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch

from pipelines.models import load as models
from pipelines.runs.messages import quietly
from pipelines.settings.parts import ModelConfig
from tests.benchmarks.compare_selections import SHARED, TARGETS, command

METHODS = ("rds", "less", "auto")


def drop_layers(name: str, share: float, folder: Path) -> Path:
    """Save a model with some of its decoder layers, evenly spaced, the first and the last among them."""
    if (folder / "config.json").is_file():
        return folder
    loaded = models.load(ModelConfig(name=name, dtype="float32"))
    inner = loaded.model.model
    count = max(2, round(share * len(inner.layers)))
    kept = torch.linspace(0, len(inner.layers) - 1, count).round().long().tolist()
    inner.layers = torch.nn.ModuleList(inner.layers[place] for place in kept)
    loaded.model.config.num_hidden_layers = count
    if getattr(loaded.model.config, "layer_types", None):
        loaded.model.config.layer_types = [loaded.model.config.layer_types[place] for place in kept]
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def chosen(model: Path | str, label: str, method: str, target: str, seed: int, options: argparse.Namespace) -> set[str]:
    """Return the ids that a model selects for a target."""
    out = Path(options.out)
    home = out / f"{label}-{seed}"
    pool = SHARED / "data" / "train" / options.pool
    words = ["select", "--model", model, "--chat-template", options.chat, "--train", pool, "--on-bad-row", "skip"]
    words += ["--target", SHARED / "data" / "targets" / target / "dev.jsonl", "--budget", options.budget]
    words += ["--max-length", options.max_length, "--seed", seed, "--set", f"features.folder={home / 'features'}"]
    warm = home / "warm"
    if not (warm / "selected.jsonl").is_file():
        command(*words, "--method", "less", "--set", "features.checkpoints=last", "--out", warm)
    given = ["--checkpoints", warm / "warmup", "--set", "features.checkpoints=last"] if method != "rds" else []
    run = home / target / method
    command(*words, "--method", method, *given, "--out", run, "--accept-change", "code")
    return {json.loads(line)["id"] for line in (run / "selected.jsonl").read_text().splitlines()}


def main() -> None:
    """Print the overlap of the selections of smaller models with those of the whole model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--chat", default="auto")
    parser.add_argument("--others", nargs="*", default=[], help="more models that select, such as stories260k")
    parser.add_argument("--pool", default="mix-1k.jsonl")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budget", default="50")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", default="runs/transfer")
    options = parser.parse_args()
    targets = options.targets.split(",")
    out = Path(options.out)
    with quietly():
        selecting = {"whole, another seed": (options.model, "whole", 1)}
        for label, share in (("half", 0.5), ("quarter", 0.25)):
            selecting[f"{label} of the layers"] = (drop_layers(options.model, share, out / "models" / label), label, 0)
        for other in options.others:
            selecting[Path(other).name] = (other, Path(other).name, 0)
        print("| selected by | method | " + " | ".join(targets) + " | mean |")
        print("| --- | --- |" + " --- |" * (len(targets) + 1))
        for method in options.methods.split(","):
            whole = {target: chosen(options.model, "whole", method, target, 0, options) for target in targets}
            for label, (model, name, seed) in selecting.items():
                found = [(whole[t], chosen(model, name, method, t, seed, options)) for t in targets]
                shares = [len(one & other) / len(one | other) for one, other in found]
                cells = " | ".join(f"{share:.2f}" for share in [*shares, fmean(shares)])
                print(f"| {label} | {method} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
