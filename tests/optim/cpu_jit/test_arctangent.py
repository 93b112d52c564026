"""The arctangent of compiled steps is that of IEEE 754, for every kind of float."""

import ctypes
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim import backend

pytestmark = pytest.mark.skipif(not backend.use_cpu_jit(), reason="llvmlite is not installed, or OPTIM_BACKEND=torch")


def compiled_atan2():
    from optim.cpu_jit import machine
    from optim.cpu_jit.arctangent import atan2
    from optim.cpu_jit.arithmetic import Block, Code

    block, declared = Block(), set()
    code = Code(None, declared)
    result = atan2(partial(code.put, block), partial(code.call, block), "%y", "%x")
    body = ["define float @angle(float %y, float %x) {", *block.lines, f"  ret float {result}", "}"]
    address, engine = machine.compiled("\n".join([*sorted(declared), *body]))
    return ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_float, ctypes.c_float)(address("angle")), engine


ANGLE, ENGINE = compiled_atan2() if backend.use_cpu_jit() else (None, None)
FLOATS = st.floats(width=32)


@given(FLOATS, FLOATS)
def test_every_float(y, x):
    want, found = np.float32(math.atan2(y, x)), np.float32(ANGLE(y, x))
    if math.isnan(y) or math.isnan(x):
        assert np.isnan(found)
    else:
        assert abs(found - want) <= np.spacing(abs(want)) and np.signbit(found) == np.signbit(want)


@pytest.mark.parametrize("y", [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, 3e38])
@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, 3e38])
def test_special_values(y, x):
    assert ANGLE(y, x) == np.float32(math.atan2(y, x)) and np.signbit(ANGLE(y, x)) == np.signbit(math.atan2(y, x))


def test_values_are_those_of_the_definition_rounded():
    rng = np.random.default_rng(0)
    y, x = rng.standard_normal((2, 20_000)).astype(np.float32)
    found = np.array([ANGLE(a, b) for a, b in zip(y, x, strict=True)], np.float32)
    assert np.mean(found == np.arctan2(y.astype(float), x.astype(float)).astype(np.float32)) > 0.999
