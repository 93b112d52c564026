"""A user's own `optim.py`, `datatools/` or `pipelines/`: named where it hides ours, left alone where it does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

EDITABLE = """
import importlib.machinery, sys

class Finder:  # an editable install finds packages after everything on the path
    def find_spec(name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, [REPOSITORY]) if path is None else None

sys.meta_path.append(Finder)
import datatools
print("works")
"""
BIN = "import sys\nfrom pipelines.cli import main\nsys.argv = ['datatools', '--version']\nsys.exit(main())"
MIXED = "import sys\nsys.path.insert(0, 'a')\nimport optim\nsys.path.insert(0, 'b')\nimport datatools"
SCRIPT = "import datatools\nprint('works')"
RENAME = "rename {here}/"
SKIP = ", or start `python -P`"

CASES = {
    "a file": ({"optim.py": "x = 1", "run.py": SCRIPT}, "run.py", ["{here}/optim.py hides", f"{RENAME}optim.py{SKIP}"]),
    "a file, with -P": ({"optim.py": "x = 1", "run.py": SCRIPT}, "-P run.py", []),
    "a package": ({"optim/__init__.py": ""}, "-m pipelines", ["{here}/optim hides", f"{RENAME}optim{SKIP}"]),
    "datatools, for pipelines": (
        {"datatools.py": "", "run.py": "import pipelines"},
        "run.py",
        [f"{RENAME}datatools.py"],
    ),
    "a folder without __init__": ({"optim/notes.txt": "", "run.py": SCRIPT}, "run.py", []),
    "the same, editable": ({"optim/notes.txt": "", "run.py": EDITABLE}, "-S run.py", ["{here}/optim hides", SKIP]),
    "PYTHONPATH": ({"theirs/optim.py": "", "run.py": SCRIPT}, "run.py", ["or take {here}/theirs out of PYTHONPATH"]),
    "optim imports datatools": ({"optim.py": "import datatools"}, "-c 'import optim'", [f"{RENAME}optim.py{SKIP}"]),
    "the script itself": ({"optim.py": "import datatools"}, "optim.py", [f"{RENAME}optim.py"]),
    "sys.path": (
        {"more/optim.py": "", "run.py": f"import sys\nsys.path[:0] = ['', 'more']\n{SCRIPT}"},
        "run.py",
        ["{here}/more/optim.py hides", "because its folder comes first in sys.path"],
    ),
    "a notebook": (
        {"optim.py": "", "ipykernel.py": "", "run.py": f"import ipykernel\n{SCRIPT}"},
        "run.py",
        [f"{RENAME}optim.py and restart the kernel"],
    ),
    "pipelines of their own": (
        {"pipelines/__init__.py": "import datatools", "run.py": f"import pipelines\n{SCRIPT}"},
        "run.py",
        [],
    ),
    "the command elsewhere": ({"optim.py": "", "bin/datatools": BIN}, "bin/datatools", []),
    "another checkout": ({"COPY": "", "run.py": f"{SCRIPT}\nassert datatools.__file__.startswith(HERE)"}, "run.py", []),
    "two checkouts": (
        {"a/COPY": "", "b/COPY": "", "run.py": MIXED},
        "run.py",
        ["two copies of this project are mixed: datatools is loaded from {here}/b, optim from {here}/a"],
    ),
}


@pytest.mark.parametrize(("files", "argv", "said"), CASES.values(), ids=CASES)
def test_what_hides_our_packages_is_named(tmp_path, files, argv, said):
    """Every `said` is in the one line of the error; nothing to say: the command works."""
    here = tmp_path.resolve()
    for name, text in files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "COPY":
            _copy(path.parent)
        else:
            path.write_text(f"REPOSITORY, HERE = {str(REPOSITORY)!r}, {str(here)!r}\n{text}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    theirs = [str(here / "theirs")] if (here / "theirs").exists() else []
    environment["PYTHONPATH"] = os.pathsep.join([*theirs, str(REPOSITORY)]) if "-S" not in argv else ""
    words = ["-c", "import optim"] if argv.startswith("-c") else argv.split()
    done = subprocess.run([sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True)
    if not said:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        line = done.stderr.splitlines()[-1]
        assert done.returncode and line.startswith("ImportError: ")
        assert not [words for words in said if words.replace("{here}", str(here)) not in line], line


def _copy(folder: Path) -> None:
    """As much of another checkout as an import of `datatools` reads."""
    for name in ("optim/__init__.py", "pipelines/__init__.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
    (folder / "datatools").mkdir()
    for name in ("__init__.py", "shadowed.py"):
        shutil.copy(REPOSITORY / "datatools" / name, folder / "datatools" / name)
