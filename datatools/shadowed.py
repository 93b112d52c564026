"""Names the file that shadows one of this project's packages, before an import from it fails with an obscure error.

The packages `optim`, `datatools` and `pipelines` are in the same folder. A user's own `optim.py` or folder `datatools`
that comes earlier on Python's path replaces ours. `datatools` and `pipelines` check for this in their `__init__`;
`pipelines` loads this file by its path, because `datatools` may be the shadowed name. Standard library only.
"""

import os
import sys
from importlib.util import find_spec

_PACKAGES = ("optim", "datatools", "pipelines")


def check_packages(*names: str, home: str, needed_by: str) -> None:
    """Refuse packages that Python would import from anywhere but the folder of the importing package.

    Args:
        names: the packages to look up; they are not imported.
        home: the folder that contains this project's packages.
        needed_by: the package that needs them, for the message.

    Raises:
        ImportError: if another file or folder with such a name comes first. The message names both, and the remedy.

    """
    for name in names:
        found = _found(name)
        ours = os.path.join(home, name)
        if found is not None and os.path.realpath(found) != os.path.realpath(ours):
            raise ImportError(_message(name, found, ours, needed_by), name=name, path=found)


def _found(name: str) -> str | None:
    """Return the file or folder that `import name` would load; None if there is none, or the module has no spec."""
    try:
        spec = find_spec(name)
    except ValueError:  # in sys.modules, without a spec
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        return spec.origin
    return next(iter(spec.submodule_search_locations), None)


def _message(name: str, found: str, ours: str, needed_by: str) -> str:
    folder = os.path.dirname(os.path.abspath(found))
    if all(os.path.isfile(os.path.join(folder, package, "__init__.py")) for package in _PACKAGES):
        return (
            f"two copies of this project are mixed: {needed_by} is loaded from {os.path.dirname(ours)}, {name} from "
            f"{folder}; leave only one of them in PYTHONPATH and sys.path (which starts with the script's folder)"
        )
    remedy = f"rename {found}"
    if any(_same(entry, folder) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry):
        why, remedy = "PYTHONPATH names its folder", f"{remedy}, or take {folder} out of PYTHONPATH"
    elif sys.path and not sys.flags.safe_path and _same(sys.path[0], folder):
        why = "Python looks first in the folder of the script, or in the current folder"
        remedy += (
            " and restart the kernel"
            if "ipykernel" in sys.modules
            else ", or start `python -P`, which skips that folder"
        )
    else:
        why = "its folder comes first in sys.path"
    return f"{found} hides the package `{name}` that {needed_by} needs ({ours}), because {why}; {remedy}"


def _same(entry: str, folder: str) -> bool:
    return os.path.realpath(entry or os.getcwd()) == os.path.realpath(folder)
