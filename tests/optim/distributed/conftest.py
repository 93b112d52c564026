"""One job of two ranks and one of three, for all the tests: to start processes is what takes time."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from optim import RULES
from tests.conftest import golden_folder
from tests.optim import golden
from tests.optim.distributed import jobs, processes
from tests.optim.specs import SPECS


@pytest.fixture(scope="session")
def onebit_cases(pytestconfig: pytest.Config) -> list[tuple[dict[str, Any], tuple[Any, ...]]]:
    """The golden cases of 1-bit Adam with the arguments of `jobs.onebit`, in float32 and float64; none without them.

    Without the first gradient, which the published code loses, and one step less of warm-up.
    """
    found = []
    for golden_case in golden.of_kind(golden_folder(pytestconfig), "OneBitAdam"):
        case = golden_case.entry | {"id": golden_case.id}
        stored = np.load(golden_case.folder / case["file"], allow_pickle=False)
        if case["world_size"] != 2:
            continue  # reported as one that did not run
        at = case["case"] + "/"
        inputs = {key.removeprefix(at): torch.tensor(stored[key]) for key in stored.files if key.startswith(at)}
        hyper = case["hyper"] | {"freeze_step": case["hyper"]["freeze_step"] - 1}
        steps = list(range(1, case["steps"]))
        found += [(case, (inputs, case["params"], steps, hyper, dtype)) for dtype in (torch.float32, torch.float64)]
    return found


@pytest.fixture(scope="session")
def job_of(
    tmp_path_factory: pytest.TempPathFactory, onebit_cases: list[tuple[dict[str, Any], tuple[Any, ...]]]
) -> Callable[[int], list[Any]]:
    """Ranks -> what `jobs.job` returned, by rank."""
    divided = {"adamw", "schedule_free_adamw"}  # two of the elementwise rules, which are divided on request
    names = sorted(name for name in RULES if (not RULES[name].elementwise or name in divided) and name in SPECS)

    @cache
    def job(ranks: int) -> list[Any]:
        cases = [arguments for _, arguments in onebit_cases] if ranks == 2 else []
        return processes.run(jobs.job, ranks, tmp_path_factory.mktemp("ranks"), names, cases)

    return job
