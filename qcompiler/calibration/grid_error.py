"""What rounding to a grid costs, from a histogram of the values.

Inside a bin that is an interval values count as uniform. In steps of the grid, with r(t) the code
that t is rounded and saturated to (less the zero point), the squared error (t - r(t))² then has the
integral r(t)/12 + (t - r(t))³/3, within the grid and beyond it alike, so one bin costs two
evaluations whatever its width. On the floats of 8 bits r(t)/12 becomes the sum over the distances
between neighbouring numbers (`quant/float_codes.py`).
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.histogram import F64, Histogram
from qcompiler.quant.arithmetic import round_scale
from qcompiler.quant.float_codes import FIRST_STEP, round_e4m3, squared_error_integral
from qcompiler.quant.qtype import QType

_POINT: Final = 2.0**-12
"""Bins narrower than this share of their value are points: their integrals would cancel out."""
_BATCH: Final = 1 << 17
"""Numbers in a temporary array, so that it stays in cache."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scale and zero point: a code stands for `(code - zero_point) * scale`.

    Attributes:
        scale: Positive, a number of the type that stores it.
        zero_point: Within the codes of the type.
    """

    scale: float
    zero_point: int


def grid_of(
    lo: float,
    hi: float,
    qtype: QType,
    *,
    symmetric: bool,
    scale_dtype: npt.DTypeLike = np.float32,
) -> Grid:
    """Return the grid of a range, as QuantizeLinear will apply it.

    Args:
        lo: Lower end, at most 0.
        hi: Upper end, at least 0.
        qtype: Integer type of the codes.
        symmetric: Whether the zero point is the middle of the codes (0 for signed types).
        scale_dtype: Type that stores the scale.
    """
    scale, zero = _grids(np.array([lo]), np.array([hi]), qtype, symmetric, scale_dtype)
    return Grid(float(scale[0]), int(zero[0]))


def _grids(
    lo: F64, hi: F64, qtype: QType, symmetric: bool, scale_dtype: npt.DTypeLike
) -> tuple[F64, F64]:
    if symmetric:
        middle = (qtype.qmin + qtype.qmax + 1) // 2
        wished = np.maximum(hi, -lo) / (qtype.qmax - middle)
        return _stored(wished, scale_dtype), np.full(len(lo), float(middle))
    scale = _stored((hi - lo) / (qtype.qmax - qtype.qmin), scale_dtype)
    return scale, np.clip(np.rint(qtype.qmin - lo / scale), qtype.qmin, qtype.qmax)


def _stored(scale: F64, dtype: npt.DTypeLike) -> F64:
    return round_scale(scale, dtype).astype(np.float64)


class RoundingError:
    """The squared error of one tensor on any grid of a type.

    Args:
        histogram: Of the tensor.
        qtype: Integer type of the codes.
        symmetric: As in `grid_of`.
        scale_dtype: Type that stores scales.

    Attributes:
        signal: Sum of the squared values.
    """

    def __init__(
        self,
        histogram: Histogram,
        qtype: QType,
        *,
        symmetric: bool,
        scale_dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._qtype, self._symmetric, self._scale_dtype = qtype, symmetric, scale_dtype
        lower, upper = histogram.edges
        counts = histogram.counts.astype(np.float64)
        wide = upper - lower > _POINT * np.maximum(np.abs(lower), np.abs(upper))
        self._edges = np.stack([lower[wide], upper[wide]])
        self._density = counts[wide] / (upper[wide] - lower[wide])
        self._points = lower[~wide] + (upper[~wide] - lower[~wide]) / 2
        self._point_counts = counts[~wide]
        # Sums of squares up to each bin: what is rounded to zero is lost whole.
        cubes = self._edges**3 / 3
        self._squares = self._density * (cubes[1] - cubes[0])
        self.signal = float(
            np.add.reduce(self._squares) + np.add.reduce(self._point_counts * self._points**2)
        )

    def of(self, lo: F64, hi: F64) -> F64:
        """Return the summed squared error for each range: float64 `[k]`, like `lo` and `hi`."""
        scale, zero = _grids(lo, hi, self._qtype, self._symmetric, self._scale_dtype)
        per_batch = max(1, _BATCH // (self._edges.size + self._points.size + 1))
        parts = [
            self._some(
                scale[start : start + per_batch, None], zero[start : start + per_batch, None]
            )
            for start in range(0, len(scale), per_batch)
        ]
        return np.concatenate(parts)

    def _some(self, scale: F64, zero: F64) -> F64:
        down, up = self._qtype.qmin - zero, self._qtype.qmax - zero
        # Zero is on every grid, so values within half a step of it become zero on all of these.
        half = float(scale.min()) / 2 * (FIRST_STEP if self._qtype.floating else 1.0)
        first = int(np.searchsorted(self._edges[0], -half))
        last = max(first, int(np.searchsorted(self._edges[1], half, side="right")))
        lost = float(np.add.reduce(self._squares[first:last]))
        kept = np.r_[0:first, last : len(self._density)]
        total = self._of_points(scale, down, up) + lost
        integral = self._integral(self._edges[1, kept] / scale, down, up)
        integral -= self._integral(self._edges[0, kept] / scale, down, up)
        integral *= self._density[kept]
        inside: F64 = np.add.reduce(integral, axis=1) * scale[:, 0] ** 3
        return total + inside

    def _of_points(self, scale: F64, down: F64, up: F64) -> F64:
        steps = self._points / scale
        if self._qtype.floating:
            codes = np.clip(steps, down, up)
            round_e4m3(codes, codes)
        else:
            codes = np.clip(np.rint(steps), down, up)
        error = steps - codes
        result: F64 = np.add.reduce(self._point_counts * error**2, axis=1) * scale[:, 0] ** 2
        return result

    def _integral(self, steps: F64, down: F64, up: F64) -> npt.NDArray[Any]:
        return squared_error_integral(steps) if self._qtype.floating else _integral(steps, down, up)


def _integral(steps: F64, down: F64, up: F64) -> npt.NDArray[Any]:
    """Return the integral of the squared rounding error from 0 to each place."""
    codes = np.rint(steps)
    # np.clip has no vectorized loop for bounds that are arrays.
    np.maximum(codes, down, out=codes)
    np.minimum(codes, up, out=codes)
    rest = steps - codes
    cubes = rest * rest
    cubes *= rest
    cubes /= 3
    codes /= 12
    cubes += codes
    return cubes
