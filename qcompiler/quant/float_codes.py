"""Rounding to floats of 8 bits (E4M3), whose steps grow with their size.

The numbers are 0, then 2**-9 to 2**-6 in steps of 2**-9, and 8 in each octave from there to 448.
"""

from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_E4M3: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_MAGNITUDE: Final = 0x7F
"""Bits of a code without its sign: the place of its magnitude among all."""

FIRST_STEP: Final = 2.0**-9
"""The smallest number above 0."""


def _numbers() -> F64:
    bits = np.arange(_MAGNITUDE, dtype=np.uint8)  # the last pattern is NaN
    numbers: F64 = bits.view(_E4M3).astype(np.float64)
    return numbers


def _integrals(numbers: F64) -> F64:
    """Return the integral of the squared rounding error from 0 to each number.

    Between two numbers it is their distance cubed, by 12.
    """
    return np.concatenate(([0.0], np.cumsum(np.diff(numbers) ** 3 / 12)))


_INTEGRALS: Final = _integrals(_numbers())


def round_e4m3(values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Write the nearest E4M3 numbers, half to the even mantissa, of values within -448..448.

    Args:
        values: float32 or float64; beyond the range they would become NaN.
        out: Of their shape, float32 or float64; may be `values`.
    """
    # A float64 is rounded to float32 on the way, which moves only values within one part in 2**24
    # of a middle.
    np.copyto(out, values.astype(_E4M3))


def squared_error_integral(values: F64) -> F64:
    """Return the integral of (t - round(t))² from 0 to each value, saturating beyond 448.

    Args:
        values: In steps of the scale, float64 of any shape.
    """
    codes = np.clip(values, -448.0, 448.0).astype(_E4M3)
    rest = values - codes.astype(np.float64)
    whole = _INTEGRALS[codes.view(np.uint8) & _MAGNITUDE]
    # The error is odd, its square even, and so the integral odd.
    result: F64 = np.copysign(whole, values) + rest**3 / 3
    return result
