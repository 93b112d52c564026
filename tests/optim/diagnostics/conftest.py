"""The diagnostics' reference numbers."""

import numpy as np
import pytest


@pytest.fixture
def reference(golden_dir, record_property):
    """`reference("spectrum")`: the arrays of that case; the test then counts as holding it."""

    def of(name):
        path = golden_dir / "matrix_family" / f"diag_{name}_shared.npz"
        if not path.is_file():
            pytest.skip(f"no {path}")
        record_property("golden", f"matrix_family:diag_{name}_shared")
        return dict(np.load(path))

    return of
