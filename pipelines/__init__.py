"""The command line and the pipelines that it runs; each pipeline is a function `run(config)`.

    from pipelines.settings.select import SelectConfig
    from pipelines.select.run import run
    folder = run(SelectConfig(model="path/to/model", train="pool.jsonl", target="dev.jsonl", budget="5%"))

Importing this package loads no heavy library, so that `datatools --help` is fast.
"""

from importlib.util import module_from_spec, spec_from_file_location
from os.path import abspath, dirname, join


def _check_packages() -> None:
    home = dirname(dirname(abspath(__file__)))
    spec = spec_from_file_location("datatools.shadowed", join(home, "datatools", "shadowed.py"))
    assert spec is not None and spec.loader is not None
    shadowed = module_from_spec(spec)  # by its path, because the name `datatools` may be shadowed
    spec.loader.exec_module(shadowed)
    shadowed.check_packages("datatools", "optim", home=home, needed_by="pipelines")


_check_packages()

from pipelines import former  # noqa: E402 (after the check)
from pipelines.models import hub_code  # noqa: E402

former.install()
hub_code.install()
