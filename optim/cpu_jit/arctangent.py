"""The arctangent of two floats as arithmetic that has vector instructions, unlike the function of the C library."""

import math
from collections.abc import Callable

import numpy as np
from numpy.polynomial import chebyshev

from optim.cpu_jit.kinds import literal

_TERMS = 13


def _coefficients() -> list[float]:
    """Return c with atan(t) = t (c_0 + c_1 t^2 + ...) for |t| <= 1, with an error below 1e-11.

    The first terms of atan(t) = 2 sum_k (-1)^k q^(2k+1) / (2k+1) T_(2k+1)(t) with q = sqrt(2) - 1.

    Source:
        Boyd, Chebyshev and Fourier Spectral Methods, 2nd edition 2001, appendix A.
    """
    series = np.zeros(2 * _TERMS)
    for k in range(_TERMS):
        series[2 * k + 1] = 2 * (-1) ** k * (math.sqrt(2) - 1) ** (2 * k + 1) / (2 * k + 1)
    return [float(c) for c in chebyshev.cheb2poly(series)[1::2]]


_C = _coefficients()


def atan2(put: Callable[[str], str], call: Callable[..., str], y: str, x: str) -> str:
    """Append the angle of the point (x, y), computed in double, to a block.

    Args:
        put: A function that appends an instruction and returns the name of its result.
        call: A function that appends the call of an intrinsic, from its name, its type and its arguments.
        y: The name of a float.
        x: The name of a float.

    Returns:
        The name of a float: `math.atan2(y, x)`, rounded. Zeros with a sign, infinities and NaN as IEEE 754 has them.
    """

    def double(value: float) -> str:
        return literal(value, "double")

    def choose(condition: str, yes: str, no: str) -> str:
        return put(f"select i1 {condition}, double {yes}, double {no}")

    wide_y, wide_x = put(f"fpext float {y} to double"), put(f"fpext float {x} to double")
    high, across = call("fabs", "double", wide_y), call("fabs", "double", wide_x)
    steep = put(f"fcmp ogt double {high}, {across}")
    low, top = choose(steep, across, high), choose(steep, high, across)
    t = put(f"fdiv double {low}, {top}")
    t = choose(put(f"fcmp oeq double {low}, {top}"), double(1), t)  # two infinities
    t = choose(put(f"fcmp oeq double {put(f'fadd double {low}, {top}')}, {double(0)}"), double(0), t)  # two zeros
    square, angle = put(f"fmul double {t}, {t}"), double(_C[-1])
    for c in reversed(_C[:-1]):
        angle = put(f"fadd double {put(f'fmul double {angle}, {square}')}, {double(c)}")
    angle = put(f"fmul double {angle}, {t}")
    angle = choose(steep, put(f"fsub double {double(math.pi / 2)}, {angle}"), angle)
    sign = call("copysign", "double", double(1), wide_x)
    left = put(f"fcmp olt double {sign}, {double(0)}")
    angle = choose(left, put(f"fsub double {double(math.pi)}, {angle}"), angle)
    return call("copysign", "float", put(f"fptrunc double {angle} to float"), y)
