"""Makes the pictures of reports on the pages of coresets and orders: `python docs/pictures.py MODEL`.

The script writes the demo's rows to a temporary folder, runs the commands of `COMMANDS` there, and takes a screenshot
of each report with Chromium. MODEL is any small model: a folder, a hub name or a .gguf file. A model without a chat
template gets the template `tulu`. The pictures in the repository come from a Llama with 260,000 weights.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAGES = Path(__file__).resolve().parent / "pages"

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("train", "--coreset", "colm", "--large-batch", "16", "--keep", "8", "--source-key", "dataset", "--epochs", "4",
     "--out", "runs/coreset"),
    ("order", "validate", "--batches", "16", "--orders", "16", "--estimators", "pairwise,reduced", "--learning-rate",
     "3e-4", "--out", "runs/order"),
    ("order", "search", "--out", "runs/order"),
)  # fmt: skip
"""Arguments of `datatools`; the first command of each folder also gets the model and the rows."""

PICTURES = {"coreset": ("runs/coreset", 980), "order": ("runs/order", 1130)}
"""Name of the picture -> the run folder, and the height of the picture in pixels."""


REPORTS = {"optimizers": 2200, "approximation": 2230}
"""Name of a picture of a report that takes long to make -> its height in pixels: those of
`python -m tests.benchmarks.compare_optimizers` and of `python examples/approximation.py`."""


def run(model: str, folder: Path) -> None:
    """Run all commands in a folder.

    Args:
        model: The model, as `--model` takes it.
        folder: The folder, which gets the demo's rows and the run folders.
    """
    subprocess.run([sys.executable, "-m", "pipelines.demo_data.make", "."], cwd=folder, check=True)
    given = ("--model", model, "--data", "pool.jsonl", "--chat-template", "tulu")
    for command in COMMANDS:
        first = not (folder / command[-1]).exists()
        subprocess.run([sys.executable, "-m", "pipelines", *command, *(given if first else ())], cwd=folder, check=True)


def photograph(chromium: str, report: Path, picture: Path, height: int) -> None:
    """Save the top of a report as a picture.

    Args:
        chromium: The program.
        report: The HTML file.
        picture: The PNG file to write.
        height: Pixels from the top of the page.
    """
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1100,{height}")
    subprocess.run([chromium, *options, f"--screenshot={picture}", report.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder, a hub name or one .gguf file")
    parser.add_argument(
        "--report", action="append", default=[], metavar="NAME=FILE", help=f"only this picture: {', '.join(REPORTS)}"
    )
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium", help="the browser")
    given = parser.parse_args()
    for name, _, file in (report.partition("=") for report in given.report):
        photograph(given.chromium, Path(file).resolve(), PAGES / f"{name}.png", REPORTS[name])
    if given.report:
        return
    if given.model is None:
        parser.error("name a model, or a --report")
    with tempfile.TemporaryDirectory() as name:
        run(given.model, Path(name))
        for picture, (folder, height) in PICTURES.items():
            report = Path(name) / folder / "report.html"
            photograph(given.chromium, report, PAGES / f"{picture}.png", height)


if __name__ == "__main__":
    main()
