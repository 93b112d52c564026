"""The diagnostics' reference numbers."""

import numpy as np
import pytest

from tests.optim import golden

KINDS = {
    "spectrum": "diagnostic: spectrum isotropy",
    "linf": "diagnostic: l-infinity smoothness",
    "sharpness": "diagnostic: blockwise sharpness",
    "condition": "diagnostic: condition number and TSCNC penalties",
    "double_descent": "diagnostic: double descent versus conditioning",
}


@pytest.fixture
def reference(golden_dir, record_property):
    """`reference("spectrum")`: the arrays of that case; the test then counts as holding it."""

    def of(name):
        found = golden.of_kind(golden_dir, KINDS[name])
        if not found:
            pytest.skip(f"no case of {KINDS[name]!r} in {golden_dir}")
        record_property("golden", found[0].id)
        return dict(np.load(found[0].folder / found[0].entry["file"]))

    return of
